"""LLaVA: a CLIP-like tower, a two-layer projector and any causal language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, ProcessorMixin


@dataclass(kw_only=True)
class Llava(Family):
    model_types = ("llava",)

    def fix_processor(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        """Set the patch size that older checkpoints lack: without it the processor writes the wrong number of image tokens."""
        vision = config.vision_config
        if processor.patch_size is None:
            processor.patch_size = vision.patch_size
        if processor.vision_feature_select_strategy is None:
            processor.vision_feature_select_strategy = config.vision_feature_select_strategy
            # towers with a class token (CLIP, DINOv2) put it before the patches; "default" drops it again
            processor.num_additional_image_tokens = 0 if "siglip" in vision.model_type else 1

    def features_per_image(self, batch: dict[str, torch.Tensor], config: PretrainedConfig) -> list[int] | None:
        """Patches of the tower at the processed size, plus the class token if strategy "full" keeps it."""
        pixels = batch.get("pixel_values")
        if pixels is None:
            return []
        patch = config.vision_config.patch_size
        has_class_token = "siglip" not in config.vision_config.model_type
        kept = 1 if has_class_token and config.vision_feature_select_strategy == "full" else 0
        dropped = 1 if not has_class_token and config.vision_feature_select_strategy == "default" else 0
        return [(pixels.shape[-2] // patch) * (pixels.shape[-1] // patch) + kept - dropped] * pixels.shape[0]
