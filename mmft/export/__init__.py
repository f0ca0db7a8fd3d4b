"""Merge an adapter, write a model card, upload a model."""
