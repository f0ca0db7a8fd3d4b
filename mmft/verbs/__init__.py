"""The verbs of the command line, one per file. A verb is a dataclass of its keys, called with the composed config."""
