"""Read files of rows, one format a module."""
