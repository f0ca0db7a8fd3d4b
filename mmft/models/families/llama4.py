"""Llama 4: its class in transformers reads an output that its language model does not give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(kw_only=True)
class Llama4(Family):
    model_types = ("llama4",)

    def fix_model(self, model: PreTrainedModel) -> None:
        """Give the language model's output the empty `image_outputs` that Llama4ForConditionalGeneration.forward copies (transformers 5.24)."""
        model.language_model.register_forward_hook(_with_image_outputs)


def _with_image_outputs(module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if not isinstance(output, tuple) and not hasattr(output, "image_outputs"):
        output.image_outputs = None
    return output
