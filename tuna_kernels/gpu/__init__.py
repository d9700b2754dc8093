"""Shared by GPU kernels: whether they can run, how they are launched, which builds there are."""
