"""Training: settings, the trainer, what makes a run survive, what it leaves behind."""
