"""Encoded tensors and tables of samples on disk."""
