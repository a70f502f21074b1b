"""A training run: its loop, checkpoints, distribution, optimizers, reports and exported files."""
