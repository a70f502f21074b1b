"""training.report."""
