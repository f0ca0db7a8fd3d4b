"""Data: sources yield rows, `prepare` checks and divides them, later verbs read the prepared set as samples."""
