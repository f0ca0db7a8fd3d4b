"""vLLM as the backend of serve, evaluate and predict: a process of its own that gets token ids and images, and its check against transformers."""
