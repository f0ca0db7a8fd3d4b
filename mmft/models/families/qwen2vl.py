"""Qwen2-VL (and the families that count image tokens the same way: Qwen2.5-VL, Qwen3-VL)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Family


@dataclass(kw_only=True)
class Qwen2VL(Family):
    def features_per_image(self, batch: dict[str, Any], config: Any) -> list[int] | None:
        """grid t*h*w patches, merged spatial_merge_size x spatial_merge_size to one feature (Qwen2VLConfig.vision_config)."""
        grid = batch.get("image_grid_thw")
        merge = config.vision_config.spatial_merge_size**2
        return [] if grid is None else [int(n) // merge for n in grid.prod(dim=-1)]
