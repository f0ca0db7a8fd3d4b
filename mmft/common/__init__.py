"""Errors, hashing and small helpers that every package may use."""
