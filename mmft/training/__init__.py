"""The Trainer subclass, its callbacks, checkpoints and resuming."""
