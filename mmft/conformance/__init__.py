"""Conformance: check that a model family is trained and used correctly."""
