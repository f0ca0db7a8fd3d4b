"""Metrics of generated answers: one class and one yaml file in conf/metrics/ for each."""
