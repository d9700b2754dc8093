"""Several commands as one resumable run."""
