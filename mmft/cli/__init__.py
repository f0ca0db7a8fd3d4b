"""Parse the command line, show help, print errors in one line."""
