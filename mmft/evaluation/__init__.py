"""Measure a model on held-out rows: loss, generated answers, metrics; read the inputs and write the answers of `predict`."""
