"""Triton kernels of the LM head, one kernel a file."""
