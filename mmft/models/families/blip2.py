"""BLIP-2 with OPT: Q-Former queries stand in the text as `<image>` tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...common.errors import UserError
from .base import Family


@dataclass(kw_only=True)
class Blip2(Family):
    def fix_processor(self, processor: Any, config: Any) -> None:
        """Without the number of queries the processor writes no placeholders, and the model never sees the image."""
        if not config.use_decoder_only_language_model:
            raise UserError(f"model.path={self.path}: BLIP-2 with an encoder-decoder (Flan-T5) is not supported; use an OPT variant")
        if config.image_token_index is None:
            raise UserError(
                f"model.path={self.path}: its config.json has no image_token_index, so the text cannot hold the image; "
                "use a revision of the checkpoint that has it"
            )
        if processor.num_query_tokens is None:
            processor.num_query_tokens = config.num_query_tokens
        known = processor.tokenizer.convert_tokens_to_ids(str(processor.image_token))
        if known != config.image_token_index:
            raise UserError(
                f"model.path={self.path}: the tokenizer's <image> has id {known}, the model expects {config.image_token_index}; "
                "use the processor files that belong to this checkpoint"
            )

    def features_per_image(self, batch: dict[str, Any], config: Any) -> list[int] | None:
        """One feature for each query of the Q-Former (Blip2Config.num_query_tokens)."""
        pixels = batch.get("pixel_values")
        return [] if pixels is None else [config.num_query_tokens] * pixels.shape[0]

    def language_model(self, model: Any) -> Any:
        return model.language_model  # Blip2's generate hands over to it, with its settings
