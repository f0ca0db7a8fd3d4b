"""Idefics and SmolVLM."""

from __future__ import annotations

import small_models

from .base import ModelType

TYPES = {"smolvlm": ModelType(small_models.smolvlm, "tiled", group="smolvlm")}
