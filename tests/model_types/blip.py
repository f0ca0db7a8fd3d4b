"""BLIP-2 and InstructBLIP."""

from __future__ import annotations

import small_models

from .base import ModelType

TYPES = {
    "blip-2": ModelType(small_models.blip2, "Q-Former", group="blip2", collator="caption", template="none: captions"),
    "instructblip": ModelType(small_models.instructblip, "Q-Former that reads the question", group="instructblip", collator="caption", template="none: captions"),
}
