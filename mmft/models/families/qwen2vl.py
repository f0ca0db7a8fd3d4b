"""Qwen2-VL, and the families that count image tokens the same way: Qwen2.5-VL, Qwen3-VL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class Qwen2VL(Family):
    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """t x h x w patches of the grid, each spatial_merge_size x spatial_merge_size of them merged into one feature."""
        grid = batch.get("image_grid_thw")
        merge = config.vision_config.spatial_merge_size**2
        return [] if grid is None else [int(n) // merge for n in grid.prod(dim=-1)]
