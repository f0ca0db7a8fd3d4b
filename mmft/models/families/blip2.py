"""BLIP-2 and InstructBLIP, with a decoder-only or an encoder-decoder language model: queries stand in the text as `<image>` tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...common.errors import UserError
from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin


@dataclass(kw_only=True)
class Blip2(Family):
    model_types = ("blip-2", "instructblip")

    def fix_processor(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        """Set the number of queries: without it the processor writes no placeholders and the model never sees the image."""
        if config.image_token_index is None:
            raise UserError(
                f"model.path={self.path}: its config.json has no image_token_index, so the text cannot hold the image; "
                "use a revision of the checkpoint that has it"
            )
        if processor.num_query_tokens is None:
            processor.num_query_tokens = config.num_query_tokens
        image_id = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
        if image_id != config.image_token_index:
            raise UserError(
                f"model.path={self.path}: the tokenizer's <image> has id {image_id}, the model expects {config.image_token_index}; "
                "use the processor files that belong to this checkpoint"
            )

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """One feature per query of the Q-Former (Blip2Config.num_query_tokens)."""
        pixels = batch.get("pixel_values")
        return [] if pixels is None else [config.num_query_tokens] * pixels.shape[0]

    def language_model(self, model: PreTrainedModel) -> PreTrainedModel:
        return model.language_model  # Blip2's generate calls this model's generate, with its generation config
