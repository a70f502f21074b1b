"""training.distributed."""
