"""PaliGemma: image and prompt are a prefix that is read in both directions; the answer is read from left to right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class PaliGemma(Family):
    model_types = ("paligemma",)
    answer_values = {"token_type_ids": 1}  # 0 opens attention in both directions

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """One feature for each patch of the tower."""
        pixels = batch.get("pixel_values")
        return [] if pixels is None else [(config.vision_config.image_size // config.vision_config.patch_size) ** 2] * len(pixels)
