"""tools.runs."""
