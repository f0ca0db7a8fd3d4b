"""Collators: turn samples into batches of tensors, for training and for generation."""
