"""LLaVA and its descendants."""

from __future__ import annotations

import small_models

from .base import ModelType

TYPES = {
    "llava": ModelType(small_models.llava, "dense", group="llava"),
    "llava_onevision": ModelType(small_models.llava_onevision, "tiled", group="llava_onevision"),
}
