"""Metric of chosen answers: how far the probability of an answer is from the share of right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score

BINS = 15


@dataclass(frozen=True)
class Bin:
    """Answers whose probability lies in (low, high]. confidence: their mean probability. accuracy: the share of right ones."""

    low: float
    high: float
    count: int
    confidence: float
    accuracy: float


class Calibration(Metric):
    """Expected calibration error: the mean over all answers of |accuracy - confidence| of the bin that an answer lies in.

    Formula and 15 equal bins: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2. The confidence is the
    probability of the answer; an answer is right if it is a reference.
    """

    SCORES = (Score("ece", "Calibration error (ECE)", higher_is_better=False, top=None),)
    NEEDS_PROBABILITIES = True

    def __init__(self, bins: int = BINS) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise UserError(f"metrics.calibration.bins={bins}: must be a whole number above 0")
        self.bins = bins

    def problem(self, row: AnswerRecord) -> str | None:
        return super().problem(row) or (None if row.get("choices") or row.get("probabilities") else "has no choices")

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        filled = bins_of(rows, self.bins)
        total = sum(b.count for b in filled)
        return {"ece": sum(b.count * abs(b.accuracy - b.confidence) for b in filled) / total} if total else {}

    def note(self, rows: Sequence[AnswerRecord]) -> str:
        return f"{self.bins} equal bins"


def bins_of(rows: Sequence[AnswerRecord], bins: int = BINS) -> list[Bin]:
    """The bins that hold answers, over the rows with probabilities and references."""
    inside: dict[int, list[tuple[float, bool]]] = {}
    for row in rows:
        answer, probabilities = row.get("prediction"), row.get("probabilities") or {}
        if answer in probabilities and row.get("references"):
            confidence = probabilities[answer]
            number = next(n for n in range(bins) if confidence <= (n + 1) / bins or n == bins - 1)
            inside.setdefault(number, []).append((confidence, answer in row["references"]))
    return [
        Bin(n / bins, (n + 1) / bins, len(found), sum(c for c, _ in found) / len(found), sum(right for _, right in found) / len(found))
        for n, found in sorted(inside.items())
    ]
