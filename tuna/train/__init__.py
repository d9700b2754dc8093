"""Training: configuration, trainer, checkpoints and resuming, export."""
