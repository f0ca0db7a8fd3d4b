"""Ovis 2: its processor needs the grids of tiles as tensors, and asks for none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


@dataclass(kw_only=True)
class Ovis2(Family):
    model_types = ("ovis2",)

    def fix_processor(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        processor.images_kwargs = {**getattr(processor, "images_kwargs", {}), "return_tensors": "pt"}
