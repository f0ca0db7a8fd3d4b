"""Video-LLaVA: its image processor gives pixels under a name that the model no longer takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .base import Family


@dataclass(kw_only=True)
class VideoLlava(Family):
    model_types = ("video_llava",)

    def image_inputs(self, outputs: dict[str, Any]) -> dict[str, Any]:
        return {{"pixel_values_images": "pixel_values"}.get(name, name): value for name, value in outputs.items()}
