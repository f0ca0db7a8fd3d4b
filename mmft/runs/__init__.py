"""Run directories: create, load and compare runs."""
