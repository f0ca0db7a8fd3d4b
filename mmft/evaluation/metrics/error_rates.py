"""Metrics of transcriptions: character and word error rate (jiwer), ANLS (rapidfuzz)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score

if TYPE_CHECKING:
    from .draws import Draws, Resampled


class _ErrorRate(Metric):
    """Edits divided by the length of the reference; of several references the one with the lowest rate.

    The corpus rate is the sum of the edits divided by the sum of the lengths. An error rate can exceed 1.
    """

    LIBRARIES = ("jiwer",)

    def problem(self, row: AnswerRecord) -> str | None:
        return super().problem(row) or (None if any(r.strip() for r in row["references"]) else "has an empty reference")

    def row(self, row: AnswerRecord) -> MetricValues:
        return {self.SCORES[0].name: self.rate(*self.nearest(row))}

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        pairs = [self.nearest(row) for row in rows]
        output = self.process([reference for reference, _ in pairs], [prediction for _, prediction in pairs])
        return {self.SCORES[0].name: float(getattr(output, self.SCORES[0].name))}

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        import numpy as np

        from .draws import ratio

        outputs = [self.process(*self.nearest(row)) for row in rows]
        edits = [(o.substitutions + o.deletions + o.insertions, o.hits + o.substitutions + o.deletions) for o in outputs]
        wrong, length = draws.sums(np.array(edits)).T
        return {self.SCORES[0].name: ratio(wrong, length, np.nan)}

    def nearest(self, row: AnswerRecord) -> tuple[str, str]:
        """(the reference with the lowest rate, the answer)."""
        prediction = str(row["prediction"]).strip()
        return min(((r.strip(), prediction) for r in row["references"] if r.strip()), key=lambda pair: self.rate(*pair))

    def rate(self, reference: str, prediction: str) -> float:
        return float(getattr(self.process(reference, prediction), self.SCORES[0].name))

    def process(self, references: Any, predictions: Any) -> Any:
        raise NotImplementedError


class CharacterErrorRate(_ErrorRate):
    """CER: edits of characters, white space included."""

    SCORES = (Score("cer", "Character error rate", higher_is_better=False),)

    def process(self, references: Any, predictions: Any) -> Any:
        import jiwer

        return jiwer.process_characters(references, predictions)


class WordErrorRate(_ErrorRate):
    """WER: edits of words, which are separated by white space."""

    SCORES = (Score("wer", "Word error rate", higher_is_better=False),)

    def process(self, references: Any, predictions: Any) -> Any:
        import jiwer

        return jiwer.process_words(references, predictions)


class Anls(Metric):
    """Average normalised Levenshtein similarity of document VQA, against the best reference.

    1 - edits / length of the longer text, in lower case; 0 if that is below the threshold. Formula: Biten et al., "Scene Text Visual
    Question Answering", 2019, equation 1.
    """

    SCORES = (Score("anls", "ANLS"),)
    LIBRARIES = ("rapidfuzz",)

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def row(self, row: AnswerRecord) -> MetricValues:
        from rapidfuzz.distance import Levenshtein

        prediction = " ".join(str(row["prediction"]).lower().split())
        best = max(1 - Levenshtein.normalized_distance(" ".join(r.lower().split()), prediction) for r in row["references"])
        return {"anls": best if best >= self.threshold else 0.0}
