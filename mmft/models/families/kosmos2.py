"""Kosmos-2 and Kosmos-2.5: a mask says where image features go, and the ids there mean nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class Kosmos2(Family):
    model_types = ("kosmos-2", "kosmos-2.5")
    answer_values = {"image_embeds_position_mask": 0}

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """None: the ids at their places are no image tokens, so they cannot be counted."""
        return None

    def image_places(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int]:
        """Where the mask is 1; Kosmos-2.5 marks the tokens around them with -1."""
        return [int(n) for n in (batch["image_embeds_position_mask"] == 1).sum(-1)]
