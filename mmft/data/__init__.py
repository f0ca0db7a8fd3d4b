"""The data layer: sources -> prepare -> a prepared data set on disk -> samples."""
