"""training.checkpoints."""
