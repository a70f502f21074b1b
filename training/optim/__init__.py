"""training.optim."""
