"""training.stopping."""
