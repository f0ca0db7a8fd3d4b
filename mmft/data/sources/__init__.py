"""Read one data format per file."""
