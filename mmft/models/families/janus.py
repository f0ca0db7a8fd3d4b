"""Janus: its processor writes a system prompt before texts that the chat template has rendered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .base import Family

if TYPE_CHECKING:
    from transformers import PretrainedConfig, ProcessorMixin


@dataclass(kw_only=True)
class Janus(Family):
    model_types = ("janus",)

    def fix_processor(self, processor: ProcessorMixin, config: PretrainedConfig) -> None:
        """Switch that prompt off: no label could be placed behind it, and the saved processor then writes none either. `collator.system` sets one."""
        processor.use_default_system_prompt = False
