"""From samples to tensors. One collator renders both the training batch and the generation prompt."""
