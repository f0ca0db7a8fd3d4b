"""Names, order, defaults and limits of what mmft sets; the real class has more keys between them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class SamplingParams:
    n: int = 1
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self.stop_token_ids = list(self.stop_token_ids or [])
        assert self.output_kind is RequestOutputKind.DELTA and not self.stop and self.n == 1  # of what the stand-in understands
        if not 0 <= self.temperature <= 2 or not 0 < self.top_p <= 1 or self.max_tokens is None or self.max_tokens < 1 or self.min_tokens > self.max_tokens:
            raise ValueError("a value is out of its range")
