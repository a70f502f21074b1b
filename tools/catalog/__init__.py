"""The command that lists the models."""
