"""What a run directory shows a reader: a curve, a page, tables in the terminal. Reports only read run directories."""
