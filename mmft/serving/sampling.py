"""The next token of one row: the likeliest, or drawn with the request's own temperature, top_p and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from .chat_request import AnswerSettings


@dataclass
class Sampler:
    """temperature 0: the likeliest token. top_p, top_k: as in transformers; None for all tokens."""

    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    _generator: torch.Generator = field(default_factory=torch.Generator, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.seed)
        self._warpers: list[Any] = [] if self.temperature == 0 else [TemperatureLogitsWarper(float(self.temperature))]
        self._warpers += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        self._warpers += [TopPLogitsWarper(float(self.top_p))] if self.top_p is not None and self.top_p < 1 else []

    @classmethod
    def of(cls, settings: AnswerSettings, generation: Mapping[str, Any]) -> Sampler:
        """What a request says, and for the rest what the run's section `generation` says."""
        drawn = bool(generation.get("do_sample"))
        default = (generation.get("temperature") or 1.0) if drawn else 0.0
        temperature = default if settings.temperature is None else settings.temperature
        top_p = settings.top_p if settings.top_p is not None else generation.get("top_p") if drawn else None
        return cls(temperature, top_p, generation.get("top_k") if drawn else None, settings.seed)

    def draw(self, scores: torch.Tensor) -> int:
        """The next token by its scores (V,), fp32."""
        if self.temperature == 0:
            return int(scores.argmax())
        row = scores[None].cpu()
        for warper in self._warpers:
            row = warper(None, row)
        return int(torch.multinomial(row.softmax(dim=-1)[0], 1, generator=self._generator))


def top_tokens(logits: torch.Tensor, token: int, count: int) -> tuple[float, list[tuple[int, float]]]:
    """(log-probability of `token`, the `count` likeliest tokens with theirs) by logits (V,)."""
    logs = logits.float().log_softmax(dim=-1)
    best = logs.topk(min(count, logs.shape[-1])) if count else None
    return float(logs[token]), [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
