"""Interactive use of a model: streamed answers, chat in the terminal, the comparison page."""
