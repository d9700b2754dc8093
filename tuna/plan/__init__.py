"""What a training step takes and where it fits, before any GPU is rented."""
