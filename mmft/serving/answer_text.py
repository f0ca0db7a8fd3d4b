"""The text of an answer while its tokens come: what can be shown already, and where a stop text ends it."""

from __future__ import annotations

from collections.abc import Sequence

from ..collators.chat_template import THINK_BLOCKS
from ..collators.types import BatchMaker

CUT = "\ufffd"  # what a tokenizer decodes of a character whose bytes have not all come


class AnswerText:
    """Collects tokens. stop: texts that end the answer; they are no part of it. before: of the same answer, which starts anew."""

    def __init__(self, collator: BatchMaker, stop: Sequence[str], before: AnswerText | None = None):
        self.collator, self.stop = collator, tuple(stop)
        self.ids: list[int] = []
        self.stopped = False
        self._answer = ""  # as far as it is known
        self._reasoning = ""
        self._shown: list[int] = before._shown if before is not None else [0, 0]  # characters of answer and reasoning that were handed out

    def add(self, token: int) -> None:
        """Add a token and look for the stop texts."""
        self.ids.append(token)
        self._reasoning, self._answer = self.collator.split_answer(self.collator.decode([self.ids])[0], generated=True)
        places = [self._answer.find(text) for text in self.stop]
        found = [place for place in places if place >= 0]
        if found:
            self._answer, self.stopped = self._answer[: min(found)], True

    @property
    def whole(self) -> str:
        """The answer so far, to its last character."""
        return self._answer

    def news(self, final: bool) -> tuple[str, str]:
        """(new characters of the answer, of the reasoning) since the last call.

        Before the end those are held back that may still change: half a character, what may begin a stop text, and a think block that
        is not closed yet.
        """
        answer, reasoning = self._answer, self._reasoning
        if not final:
            answer, reasoning = answer.rstrip(CUT), reasoning.rstrip(CUT)
            if not reasoning and any(answer.startswith(opening[: len(answer)]) or answer.startswith(opening) for opening, _ in THINK_BLOCKS if answer):
                answer = ""
            hold = max((n for text in self.stop for n in range(1, len(text)) if answer.endswith(text[:n])), default=0)
            answer = answer[: len(answer) - hold]
        new = answer[self._shown[0] :], reasoning[self._shown[1] :]
        self._shown = [max(self._shown[0], len(answer)), max(self._shown[1], len(reasoning))]
        return new
