"""Where a run's scalars and samples go beside its own directory: one file a logger."""
