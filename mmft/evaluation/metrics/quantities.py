"""Metrics of answers that are numbers: within a tolerance, and ChartQA's relaxed accuracy."""

from __future__ import annotations

import re

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")


class NumberWithin(Metric):
    """1 if the first number in the answer differs from a reference by at most `absolute`, or by at most `relative` times the reference.

    1,234 is read as 1234; a text without a number is no answer. Rows whose references are no numbers are left out.
    """

    SCORES = (Score("number_within", "Number within the tolerance"),)

    def __init__(self, relative: float = 0.0, absolute: float = 0.0) -> None:
        if relative < 0 or absolute < 0:
            raise UserError(f"metrics: relative={relative:g} and absolute={absolute:g} must not be negative")
        self.relative, self.absolute = relative, absolute

    def problem(self, row: AnswerRecord) -> str | None:
        return super().problem(row) or (None if any(number(r) is not None for r in row["references"]) else f"has no number as reference: {row['references'][0][:60]!r}")

    def row(self, row: AnswerRecord) -> MetricValues:
        given = number(str(row["prediction"]))
        wanted = [n for r in row["references"] if (n := number(r)) is not None]
        return {"number_within": float(given is not None and any(abs(given - n) <= max(self.absolute, self.relative * abs(n)) for n in wanted))}


class RelaxedAccuracy(Metric):
    """ChartQA's relaxed accuracy: numbers may differ by `tolerance` times the reference, other answers must be equal in lower case.

    Definition: Masry et al., "ChartQA", 2022, section 5.1. A percent sign divides by 100.
    """

    SCORES = (Score("relaxed_accuracy", "Relaxed accuracy"),)

    def __init__(self, tolerance: float = 0.05) -> None:
        self.tolerance = tolerance

    def row(self, row: AnswerRecord) -> MetricValues:
        return {"relaxed_accuracy": float(any(self.agree(str(row["prediction"]).strip(), r.strip()) for r in row["references"]))}

    def agree(self, answer: str, reference: str) -> bool:
        given, wanted = _percent_or_number(answer), _percent_or_number(reference)
        if given is not None and wanted:  # a reference of 0 allows no relative difference
            return abs(given - wanted) / abs(wanted) <= self.tolerance
        return answer.lower() == reference.lower()


def number(text: str) -> float | None:
    """The first number in a text; None without one."""
    match = _NUMBER.search(text)
    return float(match[0].replace(",", "")) if match else None


def _percent_or_number(text: str) -> float | None:
    """The number that a whole text is, a percentage as a fraction; None for other texts."""
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
