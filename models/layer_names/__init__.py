"""Names of layers in files: diffusers' names, and those of the original models' code."""
