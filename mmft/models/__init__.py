"""Base models: find the files, identify and load them; families/ holds what differs between model families."""
