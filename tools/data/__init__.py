"""tools.data."""
