"""Reliability diagrams of chosen answers, as the pages' templates draw them: the share of right answers over the answers' probability."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypedDict

from ..common.records import AnswerRecord
from ..evaluation.metrics.calibration import Bin, bins_of

SIDE = 200  # pixels of the square from 0 to 1


class Bar(TypedDict):
    """x, width, height, confidence (where the bar would be calibrated): pixels. title: the numbers."""

    x: float
    width: float
    height: float
    confidence: float
    title: str


class Diagram(TypedDict):
    """One model's diagram. ece: over the same bins."""

    name: str
    ece: str
    count: int
    bars: list[Bar]


def diagrams(sides: Iterable[tuple[str, Sequence[AnswerRecord]]]) -> list[Diagram]:
    """A diagram for each (name, rows) whose answers have probabilities and references."""
    found: list[Diagram] = []
    for name, rows in sides:
        bins = bins_of(rows)
        total = sum(b.count for b in bins)
        if total:
            ece = sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total
            found.append({"name": name, "ece": f"{ece:.3f}", "count": total, "bars": [_bar(b) for b in bins]})
    return found


def _bar(b: Bin) -> Bar:
    title = f"{b.count} answers of probability {b.low:.2f} to {b.high:.2f}, {b.confidence:.3f} on average; {b.accuracy:.3f} of them right"
    return {"x": SIDE * b.low, "width": SIDE * (b.high - b.low), "height": SIDE * b.accuracy, "confidence": SIDE * b.confidence, "title": title}


def chance(row: AnswerRecord | None) -> str:
    """`p 0.83`, the probability of a chosen answer; "" for a generated one."""
    probability = ((row or {}).get("probabilities") or {}).get(str((row or {}).get("prediction")))
    return "" if probability is None else f"p {probability:.2f}"
