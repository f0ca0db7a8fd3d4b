"""InternVL."""

from __future__ import annotations

import small_models

from .base import ModelType

TYPES = {"internvl": ModelType(small_models.internvl, "tiled", group="internvl")}
