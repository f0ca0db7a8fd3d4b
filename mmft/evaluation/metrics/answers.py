"""Metrics of short answers: exact match, containment, token F1, VQA accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...common.records import AnswerRecord, MetricValues
from .base import Metric, Score
from .words import normalise

# VQA's list of number words, which its evaluation reads as digits.
_NUMBER_WORDS = {w: str(n) for n, w in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"])} | {"none": "0"}


class ExactMatch(Metric):
    """1 if the answer equals a reference, white space at both ends aside."""

    SCORES = (Score("exact_match", "Exact match"),)

    def row(self, row: AnswerRecord) -> MetricValues:
        return {"exact_match": float(str(row["prediction"]).strip() in {r.strip() for r in row["references"]})}


class ExactMatchNormalized(Metric):
    """1 if answer and a reference are equal after `normalise`."""

    SCORES = (Score("exact_match_normalized", "Exact match, normalised"),)

    def row(self, row: AnswerRecord) -> MetricValues:
        words, references = normalised(row)
        return {"exact_match_normalized": float(words in references)}


class Contains(Metric):
    """1 if a reference occurs in the answer as a sequence of whole words, after `normalise`."""

    SCORES = (Score("contains", "Contains a reference"),)

    def row(self, row: AnswerRecord) -> MetricValues:
        words, references = normalised(row)
        return {"contains": float(any(_contains(words, r) for r in references))}


class TokenF1(Metric):
    """SQuAD's F1 of two bags of words after `normalise`, against the best reference."""

    SCORES = (Score("token_f1", "Token F1"),)

    def row(self, row: AnswerRecord) -> MetricValues:
        words, references = normalised(row)
        return {"token_f1": max(_f1(words, r) for r in references)}


def token_f1(text: str, reference: str) -> float:
    """Token F1 of two texts."""
    return _f1(normalise(text).split(), normalise(reference).split())


class VqaAccuracy(Metric):
    """VQA's consensus accuracy, see `vqa_accuracy`."""

    SCORES = (Score("vqa_accuracy", "VQA accuracy"),)

    def row(self, row: AnswerRecord) -> MetricValues:
        return {"vqa_accuracy": vqa_accuracy(str(row["prediction"]), row["references"])}


def normalised(row: AnswerRecord) -> tuple[list[str], list[list[str]]]:
    """The words of the answer and of each reference."""
    return normalise(str(row["prediction"])).split(), [normalise(r).split() for r in row["references"]]


def _contains(words: list[str], wanted: list[str]) -> bool:
    if not wanted:
        return not words
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _f1(words: list[str], wanted: list[str]) -> float:
    """Two empty texts agree."""
    if not words or not wanted:
        return float(words == wanted)
    common = sum((Counter(words) & Counter(wanted)).values())
    return 2.0 * common / (len(words) + len(wanted))  # = 2PR/(P+R) with P, R = common / each length


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """min(people who gave this answer / 3, 1).

    Formula: Antol et al., "VQA: Visual Question Answering", 2015, section 3, and the evaluation page of VQA v2, which averages it
    over every set of nine of the ten people. So with ten or more references: the mean over all sets that leave one out. With fewer
    there are no nine others, and one answer could never score 1: then it is min(agreeing / min(3, number of references), 1); with a
    single reference that is a normalised exact match. Texts are compared by `normalise` with number words read as digits; the
    official script's table of contractions is not needed, for `normalise` drops apostrophes.
    """
    answer = _vqa_form(prediction)
    agree = sum(_vqa_form(r) == answer for r in references)
    people = len(references)
    if people < 10:
        return min(agree / min(3, people), 1.0)
    left_out_agrees = min((agree - 1) / 3, 1.0) if agree else 0.0
    return (agree * left_out_agrees + (people - agree) * min(agree / 3, 1.0)) / people


def _vqa_form(text: str) -> list[str]:
    return [_NUMBER_WORDS.get(w, w) for w in normalise(text).split()]
