"""Run directories: create, open, compare."""
