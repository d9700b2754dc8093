"""Other libraries' models on our kernels. Nothing here is imported by `tuna_kernels` itself."""
