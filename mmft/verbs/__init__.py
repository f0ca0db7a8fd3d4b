"""One verb a file; a task is called with the composed config."""
