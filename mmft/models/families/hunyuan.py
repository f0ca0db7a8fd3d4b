"""Hunyuan 4 with images: a newline feature ends every row of an image's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig


@dataclass(kw_only=True)
class HyV4VL(Family):
    model_types = ("hy_v4_vl",)

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """Rows of merged patches with a newline each."""
        grid, merge = batch.get("image_grid_thw"), config.vision_config.spatial_merge_size
        return [] if grid is None else [(h // merge) * (w // merge + 1) for _, h, w in grid.tolist()]
