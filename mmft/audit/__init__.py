"""Audit: what a model will see and learn from a data set, and what training will cost."""
