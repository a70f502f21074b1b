"""data.precompute."""
