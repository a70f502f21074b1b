"""data.store."""
