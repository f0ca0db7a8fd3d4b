"""Base models: `family.py` loads any of them, one small file a family holds its quirks."""
