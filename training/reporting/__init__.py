"""training.reporting."""
