"""Processes, memory, signals and start-up."""
