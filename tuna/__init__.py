"""Tuna: instruction tuning with ranked responses (arXiv 2310.13385), on the kernels of `tuna_kernels`.

Importing this package is light: torch and transformers are loaded by the modules that use them.
"""

__version__ = "0.1.0"
__all__ = ["__version__"]
