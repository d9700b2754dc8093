"""Triton kernels of the LM head, one kernel per file."""
