"""Measure a model on held-out rows: loss, generated answers, metrics."""
