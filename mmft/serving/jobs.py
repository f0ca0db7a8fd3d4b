"""A request on its way to its answer: the tokens that it has, what its client has been sent, and how long it may become."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..collators.types import BatchMaker
from ..common.errors import UserError
from ..data.images import ImageError
from .answer_text import AnswerText
from .chat_request import ChatRequest, RequestError
from .sampling import Sampler


@dataclass(frozen=True)
class TokenInfo:
    """A token that was written. top: the likeliest tokens at its place, with their log-probabilities."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What is new since the last piece. finish: "stop" or "length" in the last one. error: in place of all else."""

    text: str = ""
    reasoning: str = ""
    tokens: Sequence[TokenInfo] = ()
    finish: str | None = None
    error: RequestError | None = None


@dataclass
class Job:
    """A request on its way. listener: gets its pieces, in the engine's thread. cancelled: nobody waits for it any more."""

    request: ChatRequest
    listener: Callable[[Piece], None]
    cancelled: threading.Event = field(default_factory=threading.Event)
    prompt_tokens: int = 0
    written: int = 0
    sampler: Sampler = field(default_factory=Sampler, repr=False)
    text: AnswerText | None = None
    limit: int = 0
    new: list[TokenInfo] = field(default_factory=list, repr=False)
    sent: int = 0  # tokens whose infos were sent; a request that starts anew does not send them again

    def send(self, piece: Piece) -> None:
        if not self.cancelled.is_set():
            self.listener(piece)

    def fail(self, error: RequestError) -> None:
        self.send(Piece(error=error))

    def write(self, token: int, ends: frozenset[int], info: TokenInfo | None) -> bool:
        """Add a token; returns whether the answer has ended by it."""
        assert self.text is not None
        self.written += 1
        ended = token in ends
        if not ended:
            self.text.add(token)
            self.new += [info] if info is not None and self.written > self.sent else []
        stopped = self.text.stopped
        finish = "stop" if ended or stopped else "length" if self.written >= self.limit else None
        text, reasoning = self.text.news(final=finish is not None)
        if text or reasoning or finish or self.new:
            self.send(Piece(text, reasoning, self.new, finish))
            self.new, self.sent = [], max(self.sent, self.written)
        return finish is not None

    def end(self, finish: str) -> None:
        """End an answer whose last token has been written already."""
        text, reasoning = self.text.news(final=True) if self.text is not None else ("", "")
        self.send(Piece(text, reasoning, self.new, finish))
        self.new = []

    def begin(self, prompt_tokens: int, context: int | None, collator: BatchMaker, generation: Mapping[str, Any], usual: int | None) -> None:
        """Fix what the answer needs. Raises RequestError for a prompt that leaves no room for an answer.

        context: tokens that prompt and answer may have together; None: no limit. generation: of the model's run. usual: its limit of new tokens.
        """
        settings, self.prompt_tokens = self.request.settings, prompt_tokens
        room = None if context is None else context - prompt_tokens
        if room is not None and room < 1:
            raise RequestError(400, f"the prompt has {prompt_tokens} tokens with its images, and this model's context is {context}", "context_length_exceeded", "messages")
        wanted = settings.max_tokens
        if wanted is not None and room is not None and wanted > room:
            raise RequestError(400, f"the prompt has {prompt_tokens} tokens and max_tokens is {wanted}, together more than this model's context of {context}", "context_length_exceeded", "max_tokens")
        self.limit = min(each for each in (wanted if wanted is not None else usual or 256, room) if each is not None)
        self.sampler = Sampler.of(settings, generation)
        self.written, self.text = 0, AnswerText(collator, settings.stop, self.text)


def refusal(error: UserError) -> RequestError:
    """An error about a request's conversation or images, without the path of the file that holds an image."""
    if isinstance(error, ImageError):
        return RequestError(400, f"an image of the request: {error.reason}", "invalid_image", "messages")
    return RequestError(400, str(error), "invalid_value", "messages")

