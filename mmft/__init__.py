"""mmft: config-driven LoRA fine-tuning of vision-language models."""

__version__ = "0.1.0"
