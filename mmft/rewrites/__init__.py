"""Faster forms of modules that compute the same values."""
