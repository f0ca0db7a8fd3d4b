"""Qwen's vision-language models."""

from __future__ import annotations

import small_models

from .base import ModelType

TYPES = {
    "qwen2_vl": ModelType(small_models.qwen2vl, "native resolution", group="qwen2vl"),
    "qwen2_5_vl": ModelType(small_models.qwen2_5vl, "native resolution, window attention", group="qwen2_5vl"),
    "qwen3_vl": ModelType(small_models.qwen3vl, "deepstack", group="qwen3vl"),
}
