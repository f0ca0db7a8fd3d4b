"""Gemma and its descendants."""

from __future__ import annotations

import small_models

from .base import ModelType

TYPES = {"gemma3": ModelType(small_models.gemma3, "pooled projector", group="gemma3")}
