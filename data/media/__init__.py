"""data.media."""
