"""What a survey finds wrong with a data set: texts that occur twice, contradictions, images that look alike, rows that were left out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..data.mix import PreparedMix

if TYPE_CHECKING:
    from ..data.prepared import PreparedData
    from ..data.sample import Sample

LISTED = 1000  # rows listed of each kind of finding
LONG = 8  # words of an answer that two rows hardly share by chance
EXAMPLES = 3  # rows named for each reason why rows were left out


class Part(Protocol):
    """The rows of one source and split. words: (rows,) int32, of the answers."""

    split: str
    rows: Sequence[Sample]
    words: np.ndarray


@dataclass
class Hashes:
    """(rows,) uint64 each: of all texts of a row, of its images and question (0 without a question), of its answer."""

    text: np.ndarray
    question: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class LeftOut:
    """Rows left out or changed by preparation. examples: (row, reason)."""

    reason: str
    rows: int
    examples: list[tuple[str, str]]


@dataclass(frozen=True)
class Repeat:
    """A held-out row whose whole text (all turns) is that of a training row."""

    held_out: Sample
    split: str
    training: Sample
    words: int


@dataclass(frozen=True)
class Contradiction:
    """Rows with the same images and the same turns before the answer, and different answers (apart from case, spaces and a last full stop)."""

    rows: list[tuple[str, Sample]]  # (split, row), one for each answer


@dataclass(frozen=True)
class Alike:
    """Two images that look alike. images: (root, path, where it is shown: the splits, of a mix with the source)."""

    bits: int
    images: list[tuple[str, str, str]]
    split: bool  # whether a split shows one of them and not the other


@dataclass
class Repeats:
    """listed: at most LISTED. number: of all held-out rows whose whole text occurs in training; long: of those whose answer has at least LONG words."""

    listed: list[Repeat] = field(default_factory=list)
    number: int = 0
    long: int = 0


@dataclass
class Contradictions:
    """listed: at most LISTED. number: of all questions with several answers; rows: their rows."""

    listed: list[Contradiction] = field(default_factory=list)
    number: int = 0
    rows: int = 0


def find_repeats(parts: Sequence[Part], found: Sequence[Hashes]) -> Repeats:
    """Held-out rows whose whole text is that of a training row; long answers are listed first."""
    result = Repeats()
    training = [(number, hashes) for number, (part, hashes) in enumerate(zip(parts, found)) if part.split == "train"]
    if not training:
        return result
    known, first = np.unique(np.concatenate([hashes.text for _, hashes in training]), return_index=True)
    ends = np.cumsum([len(hashes.text) for _, hashes in training])
    pairs: list[tuple[int, int, int, int]] = []  # (words, part, row, training row)
    for number, (part, hashes) in enumerate(zip(parts, found)):
        if part.split == "train":
            continue
        rows = np.flatnonzero(np.isin(hashes.text, known))
        result.number += len(rows)
        result.long += int((part.words[rows] >= LONG).sum())
        there = first[np.searchsorted(known, hashes.text[rows])]
        longest = np.argsort(-part.words[rows], kind="stable")[:LISTED]
        pairs += [(int(part.words[rows[i]]), number, int(rows[i]), int(there[i])) for i in longest]
    for words, number, row, there_row in sorted(pairs, key=lambda pair: -pair[0])[:LISTED]:
        n = int(np.searchsorted(ends, there_row, side="right"))
        inside = there_row - (int(ends[n - 1]) if n else 0)
        result.listed.append(Repeat(parts[number].rows[row], parts[number].split, parts[training[n][0]].rows[inside], words))
    return result


def find_contradictions(parts: Sequence[Part], found: Sequence[Hashes]) -> Contradictions:
    """Questions about the same images with different answers."""
    result = Contradictions()
    question, answer = (np.concatenate([getattr(h, name) for h in found] or [np.zeros(0, np.uint64)]) for name in ("question", "answer"))
    part = np.repeat(np.arange(len(found)), [len(h.text) for h in found])
    starts = np.cumsum([0, *(len(h.text) for h in found)])
    order = np.lexsort((np.arange(len(question)), answer, question))
    order = order[question[order] != 0]
    if not len(order):
        return result
    new_question = np.r_[True, question[order][1:] != question[order][:-1]]
    new_answer = new_question | np.r_[True, answer[order][1:] != answer[order][:-1]]
    group = np.cumsum(new_question) - 1
    answers = np.bincount(group, weights=new_answer).astype(int)
    result.number = int((answers > 1).sum())
    result.rows = int((answers[group] > 1).sum())
    first_row = np.minimum.reduceat(order, np.flatnonzero(new_question))
    for wanted in sorted(np.flatnonzero(answers > 1).tolist(), key=lambda g: int(first_row[g]))[:LISTED]:
        low, high = np.searchsorted(group, (wanted, wanted + 1))
        rows = np.sort(order[low:high][new_answer[low:high]])
        result.listed.append(Contradiction([(parts[part[i]].split, parts[part[i]].rows[int(i - starts[part[i]])]) for i in rows]))
    return result


def find_left_out(source: str, prepared: PreparedData) -> list[LeftOut]:
    """The reasons of report.jsonl with their first rows."""
    examples: dict[str, list[tuple[str, str]]] = {}
    for line in _report(prepared):
        named = examples.setdefault(line["reason"].split(":")[0], [])
        if len(named) < EXAMPLES and line["action"] != "note":
            named.append((line["where"] or str(line["id"]), line["reason"]))
    reasons = sorted(prepared.manifest["reasons"].items(), key=lambda item: -item[1])
    return [LeftOut(f"{source}: {kind}" if source else kind, rows, examples.get(kind, [])) for kind, rows in reasons]


def find_alike(source: str, prepared: PreparedData) -> Iterator[Alike]:
    """The listed pairs of a set; those in two splits first."""
    pairs = sorted(prepared.alike(), key=lambda pair: pair["images"][0]["splits"] == pair["images"][1]["splits"])
    for pair in pairs:
        images = []
        for image in pair["images"]:
            name = image.get("source", source)
            owner = prepared.parts[name] if isinstance(prepared, PreparedMix) else prepared
            images.append((owner.root_of(image["stored"]), image["image"], ", ".join(f"{name}: {s}" if name else s for s in image["splits"]) or "left out"))
        yield Alike(pair["bits"], images, pair["images"][0]["splits"] != pair["images"][1]["splits"])


def _report(prepared: PreparedData) -> Iterator[dict[str, Any]]:
    with (prepared.path / "report.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)
