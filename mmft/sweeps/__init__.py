"""Plan the points of a sweep, run them, rank them."""
