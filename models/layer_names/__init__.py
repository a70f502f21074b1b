"""models.layer_names."""
