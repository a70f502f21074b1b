"""Encoding of the training data before training: listing, checking, planning, encoding."""
