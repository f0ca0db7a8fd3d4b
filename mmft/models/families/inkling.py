"""Inkling 2: the grid of an image counts its features, which are patches of 40 pixels, not smaller ones to be merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class Inkling2(Family):
    model_types = ("inkling2", "inkling2_loop")

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """The product of an image's grid."""
        grid = batch.get("image_grid_thw")
        return [] if grid is None else [int(n) for n in grid.prod(dim=-1)]
