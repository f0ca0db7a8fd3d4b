"""Rank the training rows of a run by their loss under the tuned model: rows with a wrong label stay at the top, for the model learned otherwise."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

from ..common.errors import UserError
from ..data.selection import Selection

if TYPE_CHECKING:
    from ..collators.scan import Problem
    from ..common.records import AnswerRecord
    from ..data.sample import Sample
    from ..evaluation.evaluate import Evaluator
    from ..runs.open import OpenedRun


class RankedLine(TypedDict, total=False):
    """One line of rank_*.jsonl. loss, base_loss: mean over the row's tokens with loss; base_loss is absent after full training."""

    rank: int
    id: str
    loss: float
    base_loss: float
    tokens: int
    answer: str


@dataclass
class RankedRow:
    """A training row. loss, base_loss: mean per token with loss, of the tuned and of the base model (None after full training)."""

    sample: Sample
    loss: float
    base_loss: float | None
    tokens: int

    def line(self, rank: int) -> RankedLine:
        base: RankedLine = {} if self.base_loss is None else {"base_loss": self.base_loss}
        return {"rank": rank, "id": self.sample.id, "loss": self.loss, **base, "tokens": self.tokens, "answer": self.sample.answer_text}


@dataclass
class Ranking:
    """rows: the worst first; of rows with equal loss the earlier one first. left_out: rows that cannot be computed. answers: what the tuned
    model answers to the first rows.
    """

    rows: list[RankedRow]
    left_out: list[Problem] = field(default_factory=list)
    answers: list[AnswerRecord] = field(default_factory=list)

    def worst(self, share: float, above: float | None) -> list[RankedRow]:
        """The first rows: a share below one or a number, and with `above` only rows with a higher loss."""
        count = math.ceil(share * len(self.rows)) if isinstance(share, float) else share
        return [row for row in self.rows[:count] if above is None or row.loss > above]


def check_worst(worst: float, above: float | None) -> None:
    """Raises UserError for values that choose no rows."""
    if isinstance(worst, bool) or worst <= 0 or isinstance(worst, float) and worst >= 1:
        raise UserError(f"worst={worst}: must be a number of rows (50) or a share below one (0.05)")
    if above is not None and not math.isfinite(above):
        raise UserError(f"above={above}: must be a loss per token, or null")


def rank_rows(opened: OpenedRun, evaluator: Evaluator, left_out: list[Problem]) -> Ranking:
    """The losses of the evaluator's rows under both models. Raises UserError."""
    tuned = evaluator.row_losses(opened.model)
    base: Sequence[tuple[float, int] | None] = [None] * len(tuned)
    if hasattr(opened.model, "disable_adapter"):
        with opened.base() as model:
            base = evaluator.row_losses(model)
    rows = [RankedRow(evaluator.rows[i], loss / max(tokens, 1), None if before is None else before[0] / max(tokens, 1), tokens)
            for i, ((loss, tokens), before) in enumerate(zip(tuned, base, strict=True))]  # fmt: skip
    for row in rows:
        if not math.isfinite(row.loss):
            raise UserError(f"{row.sample.id}: its loss is {row.loss}; the adapter is broken, so rows cannot be ranked")
    return Ranking(sorted(rows, key=lambda row: -row.loss), left_out)


def usable_rows(collator: Any, rows: Sequence[Sample]) -> tuple[Sequence[Sample], list[Problem]]:
    """(the rows that can be trained, the others with the reason)."""
    from ..collators.scan import scan

    unusable = scan(collator, rows, progress=True).unusable
    left_out = {problem.index for problem in unusable}
    return (Selection(rows, [i for i in range(len(rows)) if i not in left_out]) if left_out else rows), unusable


def answer_worst(ranking: Ranking, evaluator: Evaluator, model: Any, count: int) -> None:
    """Let the tuned model answer the prompts of the first `count` rows, so that label and answer can be compared."""
    samples = [row.sample for row in ranking.rows[:count]]
    with contextlib.suppress(UserError):  # without answers the ranking is still useful
        texts = evaluator.generate(model, samples)
        ranking.answers = [evaluator.record(i, sample, text) for i, (sample, text) in enumerate(zip(samples, texts, strict=True))]
