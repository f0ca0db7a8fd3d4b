"""Base against tuned on the same held-out rows: which samples to show, and where their words differ."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Any

from ..evaluation.metrics import CJK, normalise, per_sample

# A text longer than this is shown without marks: matching takes the square of the length.
LONGEST_COMPARED = 600
_PIECES = re.compile(rf"[{CJK}]|[^\s{CJK}]+|\s+")


def pair(base: list[dict], tuned: list[dict]) -> list[dict[str, Any]]:
    """One {"index", "row", "base", "tuned"} a sample that either file has, by index; what is missing is None."""
    by_index: dict[Any, dict[str, Any]] = {}
    for name, rows in (("base", base), ("tuned", tuned)):
        for place, row in enumerate(rows):
            index = row.get("index", place)
            by_index.setdefault(index, {"index": index, "row": row, "base": None, "tuned": None})[name] = row
    return [by_index[i] for i in sorted(by_index, key=lambda i: (isinstance(i, str), i))]


def scores(row: dict[str, Any] | None) -> dict[str, float]:
    """A row's own metrics; counted again where the file does not hold them; {} without a text."""
    if not row or not isinstance(row.get("prediction"), str):
        return {}
    held = row.get("metrics")
    if isinstance(held, dict) and "token_f1" in held:
        return held
    references = row.get("references") or []
    return per_sample(row["prediction"], references) if references else {}


def select(pairs: list[dict[str, Any]], limit: int = 24) -> list[dict[str, Any]]:
    """At most `limit` pairs, each with "why": the largest gains, the worst answers, and a spread of the rest.

    A third each, measured by the tuned model's token F1 (gain: minus the base's); the spread is evenly spaced by
    index, so that the page is not only extremes. Few pairs are all shown, in their order, "why" empty.
    """
    if len(pairs) <= limit:
        return [{**p, "why": ""} for p in pairs]
    f1 = [scores(p["tuned"]).get("token_f1", 0.0) for p in pairs]
    gain = [f - scores(p["base"]).get("token_f1", 0.0) for f, p in zip(f1, pairs, strict=True)]
    third = max(1, limit // 3)
    order = range(len(pairs))
    chosen = {i: "largest gain" for i in sorted(order, key=lambda i: (-gain[i], -f1[i], i))[:third]}
    for i in sorted((i for i in order if i not in chosen), key=lambda i: (f1[i], i))[:third]:
        chosen[i] = "worst answer"
    rest = [i for i in order if i not in chosen]
    wanted = limit - len(chosen)
    for k in range(wanted):
        chosen[rest[(2 * k + 1) * len(rest) // (2 * wanted)]] = "even spread"
    names = ("largest gain", "even spread", "worst answer")
    return [{**pairs[i], "why": chosen[i]} for i in sorted(chosen, key=lambda i: (names.index(chosen[i]), i))]


def verdict(row: dict[str, Any] | None) -> tuple[str, str, str]:
    """(kind, mark, words) of how a text agrees with its references."""
    s = scores(row)
    if not s:
        return "none", "", "no text"
    if s.get("exact_match"):
        return "good", "\u2713", "exact"
    if s.get("exact_match_normalized"):
        return "good", "\u2713", "same words"
    if s.get("contains"):
        return "near", "\u2248", "contains the reference"
    return "bad", "\u2717", f"F1 {s.get('token_f1', 0.0):.2f}"


def nearest(text: str, references: list[str]) -> str:
    """The reference that shares most words with the text."""
    return max(references, key=lambda r: per_sample(text, [r])["token_f1"]) if references else ""


def difference(text: str, reference: str) -> list[tuple[str, str]]:
    """The text in pieces (kind, piece): "same", "extra" (not in the reference here), "missing" (only there).

    Words are compared as the normalised metrics compare them; Han and kana by the character. Missing words are
    given only when half of the words agree: a text that says something else would drown in them.
    """
    ours, theirs = _PIECES.findall(text), _PIECES.findall(reference)
    words = [p for p in ours if not p.isspace()]
    wanted = [p for p in theirs if not p.isspace()]
    if not wanted or len(words) + len(wanted) > LONGEST_COMPARED:
        return [("same", text)] if text else []
    spaced = {i for i, p in enumerate(_starts(ours)) if p}
    result: list[tuple[str, str]] = []
    matcher = SequenceMatcher(None, [normalise(w) for w in words], [normalise(w) for w in wanted], autojunk=False)
    close = matcher.ratio() >= 0.5
    wanted_spaced = {i for i, p in enumerate(_starts(theirs)) if p}
    for kind, a, b, c, d in matcher.get_opcodes():
        if b > a:
            _add(result, "same" if kind == "equal" else "extra", words, a, b, spaced)
        if d > c and kind != "equal" and close:
            _add(result, "missing", wanted, c, d, wanted_spaced)
    return result


def _starts(pieces: list[str]) -> list[bool]:
    """For each word: whether a space stands before it."""
    return [i > 0 and pieces[i - 1].isspace() for i, p in enumerate(pieces) if not p.isspace()]


def _add(result, kind: str, words: list[str], start: int, stop: int, spaced: set[int]) -> None:
    text = "".join((" " if i in spaced and i > start else "") + words[i] for i in range(start, stop))
    if result and start in spaced:
        result.append(("same", " "))
    elif result and kind == "missing" and result[-1][0] != "same":
        result.append(("same", " " if text[:1].isascii() else ""))
    result.append((kind, text))
