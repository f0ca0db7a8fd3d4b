"""Select the answers to show and mark where they differ from the reference."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher

from ..common.records import AnswerRecord, MetricInfo, MetricValues
from ..evaluation.metrics.answers import token_f1 as text_f1
from ..evaluation.metrics.defaults import per_sample
from ..evaluation.metrics.words import CJK, normalise

# Longer texts are shown without marks: the time of matching grows with the square of the number of words.
MAX_WORDS_COMPARED = 600
_PIECES = re.compile(rf"[{CJK}]|[^\s{CJK}]+|\s+")

Verdict = tuple[str, str, str]  # (kind: good, near, bad or none; mark; words)
Piece = tuple[str, str]  # (kind: same, extra or missing; text)


@dataclass
class AnswerPair:
    """Base and tuned answer to one held-out row. row: the record of either. reason: why the pair is shown, see `select`."""

    index: int | str
    row: AnswerRecord
    base: AnswerRecord | None = None
    tuned: AnswerRecord | None = None
    reason: str = ""

    @property
    def answers(self) -> Iterator[tuple[str, AnswerRecord]]:
        """("base" | "tuned", record) of the answers that exist."""
        yield from ((name, row) for name, row in (("base", self.base), ("tuned", self.tuned)) if row is not None)


def pair(base: Sequence[AnswerRecord], tuned: Sequence[AnswerRecord]) -> list[AnswerPair]:
    """One pair for each row that either file has, ordered by index."""
    pairs: dict[int | str, AnswerPair] = {}
    for place, row in enumerate(base):
        index = row.get("index", place)
        pairs.setdefault(index, AnswerPair(index, row)).base = row
    for place, row in enumerate(tuned):
        index = row.get("index", place)
        pairs.setdefault(index, AnswerPair(index, row)).tuned = row
    return [pairs[i] for i in sorted(pairs, key=lambda i: (isinstance(i, str), i))]


def scores(row: AnswerRecord | None) -> MetricValues:
    """The metrics of one row, computed here if the file does not have them; {} without an answer."""
    if not row or not isinstance(row.get("prediction"), str):
        return {}
    stored = row.get("metrics")
    stored = stored if isinstance(stored, dict) else {}
    if "token_f1" in stored:
        return stored
    references = row.get("references") or []
    return {**per_sample(str(row["prediction"]), references), **stored} if references else stored


@dataclass(frozen=True)
class Ranking:
    """The score by which answers are ranked in reports."""

    name: str = "token_f1"
    label: str = "token F1"
    higher_is_better: bool = True

    def value(self, row: AnswerRecord | None) -> float:
        """The row's score, negative where lower is better; of a row without one, that of the worst answer."""
        value = scores(row).get(self.name)
        return (value if self.higher_is_better else -value) if value is not None else 0.0 if self.higher_is_better else -1e9


def ranking_of(rows: Sequence[AnswerRecord], info: Mapping[str, MetricInfo]) -> Ranking:
    """Token F1 where it was measured, else the first score that rows have by themselves. info: `metric_info` of summary.json."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("metrics") or {}))
    if not names or "token_f1" in names:
        return Ranking()
    one = info.get(names[0])
    return Ranking(names[0], one["label"], one["higher_is_better"]) if one else Ranking(names[0], names[0])


def select(pairs: Sequence[AnswerPair], limit: int = 24, ranking: Ranking = Ranking()) -> list[AnswerPair]:  # immutable
    """At most `limit` pairs: a third with the largest gains, a third with the worst answers, and evenly spaced others.

    Sorted by the tuned model's score (gain: minus the base's). Up to `limit` pairs are all returned, in their order, with an empty
    `reason`.
    """
    if len(pairs) <= limit:
        return list(pairs)
    score = [ranking.value(p.tuned) for p in pairs]
    gain = [s - ranking.value(p.base) for s, p in zip(score, pairs, strict=True)]
    third = max(1, limit // 3)
    order = range(len(pairs))
    reasons = {i: "largest gain" for i in sorted(order, key=lambda i: (-gain[i], -score[i], i))[:third]}
    for i in sorted((i for i in order if i not in reasons), key=lambda i: (score[i], i))[:third]:
        reasons[i] = "worst answer"
    rest = [i for i in order if i not in reasons]
    wanted = limit - len(reasons)
    for k in range(wanted):
        reasons[rest[(2 * k + 1) * len(rest) // (2 * wanted)]] = "even spread"
    names = ("largest gain", "even spread", "worst answer")
    return [replace(pairs[i], reason=reasons[i]) for i in sorted(reasons, key=lambda i: (names.index(reasons[i]), i))]


def verdict(row: AnswerRecord | None) -> Verdict:
    """How well an answer agrees with its references, and whether it was cut off at the limit of new tokens."""
    s = scores(row)
    if not s:
        return "none", "", "no text"
    cut = ", cut off" if row and row.get("truncated") else ""
    if "mean_iou" in s:
        iou = s["mean_iou"]
        return ("good", "\u2713", f"IoU {iou:.2f}{cut}") if iou >= 0.5 else ("near", "\u2248", f"IoU {iou:.2f}{cut}") if iou > 0 else ("bad", "\u2717", f"IoU 0{cut}")
    if s.get("exact_match"):
        return "good", "\u2713", f"exact{cut}"
    if s.get("exact_match_normalized"):
        return "good", "\u2713", f"same words{cut}"
    if s.get("contains"):
        return "near", "\u2248", f"contains the reference{cut}"
    return "bad", "\u2717", f"F1 {s.get('token_f1', 0.0):.2f}{cut}"


def nearest_reference(text: str, references: Sequence[str]) -> str:
    """The reference with the highest token F1 against the text; "" without references."""
    return max(references, key=lambda r: text_f1(text, r)) if references else ""


def difference(text: str, reference: str) -> list[Piece]:
    """The text in pieces: "same", "extra" (not in the reference at this place), "missing" (only in the reference).

    Words are compared as the normalised metrics compare them; Han and kana by the character. Missing words are
    given only when at least half of the words agree, else they would outnumber the text itself.
    """
    pieces, reference_pieces = _PIECES.findall(text), _PIECES.findall(reference)
    words = [p for p in pieces if not p.isspace()]
    wanted = [p for p in reference_pieces if not p.isspace()]
    if not wanted or len(words) + len(wanted) > MAX_WORDS_COMPARED:
        return [("same", text)] if text else []
    spaced, wanted_spaced = _after_space(pieces), _after_space(reference_pieces)
    result: list[Piece] = []
    matcher = SequenceMatcher(None, [normalise(w) for w in words], [normalise(w) for w in wanted], autojunk=False)
    show_missing = matcher.ratio() >= 0.5
    for kind, a, b, c, d in matcher.get_opcodes():
        if b > a:
            _add(result, "same" if kind == "equal" else "extra", words, a, b, spaced)
        if d > c and kind != "equal" and show_missing:
            _add(result, "missing", wanted, c, d, wanted_spaced)
    return result


def _after_space(pieces: Sequence[str]) -> set[int]:
    """Numbers of the words that follow a space."""
    follows = [i > 0 and pieces[i - 1].isspace() for i, p in enumerate(pieces) if not p.isspace()]
    return {i for i, after in enumerate(follows) if after}


def _add(result: list[Piece], kind: str, words: Sequence[str], start: int, stop: int, spaced: set[int]) -> None:
    text = "".join((" " if i in spaced and i > start else "") + words[i] for i in range(start, stop))
    if result and start in spaced:
        result.append(("same", " "))
    elif result and kind == "missing" and result[-1][0] != "same":
        result.append(("same", " " if text[:1].isascii() else ""))
    result.append((kind, text))
