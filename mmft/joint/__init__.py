"""Points of a sweep that share base, data and batch shape are trained together: one pass of the base over the rows of all."""
