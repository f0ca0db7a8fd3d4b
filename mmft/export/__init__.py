"""Export a trained model: merge an adapter, write a model card, upload to a hub."""
