"""Perception LM: images have different numbers of tiles, and the model takes tiles in one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Family


@dataclass(kw_only=True)
class PerceptionLM(Family):
    model_types = ("perception_lm",)

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        """The tiles of all images (tiles, channels, side, side) one after another, as if of one image: the model reads each for itself."""
        import torch

        pixels = outputs.get("pixel_values")
        return outputs if pixels is None else {**outputs, "pixel_values": torch.cat([torch.as_tensor(tiles) for tiles in pixels])[None]}
