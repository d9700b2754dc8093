"""Kernels: every backend, shape, stride, type and scale against the textbook in float64."""
