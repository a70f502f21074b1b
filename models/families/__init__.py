"""models.families."""
