"""One training run, from a composed config to a finished run directory."""
