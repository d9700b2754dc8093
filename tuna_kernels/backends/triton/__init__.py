"""Triton kernels for NVIDIA GPUs, one kernel per file."""
