"""Survey: one pass over a prepared data set counts its rows, images, answers and languages by source and split."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.mix import PreparedMix
from ..data.sample import message_text
from ..data.selection import parts_of, spread
from .findings import Alike, Contradiction, Hashes, LeftOut, Repeat, find_alike, find_contradictions, find_left_out, find_repeats
from .languages import language_teller

if TYPE_CHECKING:
    from ..data.prepared import PreparedData
    from ..data.sample import Sample

SHARES = (0, 50, 90, 99, 100)  # percentiles of sizes and lengths
TOP = 10  # most frequent answers of a source and split
LANGUAGE_ROWS = 2000  # rows of a source and split whose language is told, evenly spaced


@dataclass
class Part:
    """The rows of one source and split. source: "" for a single data set.

    sizes: (images, 2) int32, width and height of each different image. characters, words: (rows,) int32, of the answers.
    answers: the most frequent ones with their rows. distinct: number of different answers. languages: name -> rows of those looked at.
    """

    source: str
    split: str
    rows: Sequence[Sample]
    sizes: np.ndarray
    characters: np.ndarray
    words: np.ndarray
    answers: list[tuple[str, int]]
    distinct: int
    languages: Counter[str]
    without_image: int = 0
    several_images: int = 0
    with_boxes: int = 0

    @property
    def name(self) -> str:
        return f"{self.source}: {self.split}" if self.source else self.split

    def percentiles(self, values: np.ndarray) -> list[float]:
        """The values at SHARES (nearest rank); [] without values."""
        return [v.item() for v in np.percentile(values, SHARES, method="inverted_cdf")] if len(values) else []

    @property
    def aspects(self) -> np.ndarray:
        """(images,) float: width divided by height."""
        return self.sizes[:, 0] / np.maximum(self.sizes[:, 1], 1)


@dataclass
class Survey:
    """What `mmft explore` found. repeats, contradictions, alike: at most LISTED; their numbers are those of all.

    repeated: held-out rows whose whole text occurs in training; repeated_long: those whose answer has at least LONG words.
    contradicting: questions with several answers; contradicting_rows: their rows. near: pairs of images that look alike; None: a set was
    prepared without looking for them. detector: whether languages are told, not only scripts.
    """

    name: str
    rows_read: int
    parts: list[Part] = field(default_factory=list)
    left_out: list[LeftOut] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeats: list[Repeat] = field(default_factory=list)
    repeated: int = 0
    repeated_long: int = 0
    contradictions: list[Contradiction] = field(default_factory=list)
    contradicting: int = 0
    contradicting_rows: int = 0
    alike: list[Alike] = field(default_factory=list)
    near: int | None = 0
    detector: bool = False

    @property
    def rows(self) -> int:
        return sum(len(part.rows) for part in self.parts)

    @property
    def dropped(self) -> int:
        return sum(reason.rows for reason in self.left_out)


def survey(prepared: PreparedData) -> Survey:
    """Read every row of every split once. Memory: 44 bytes a row, 16 bytes an image."""
    sets = prepared.parts if isinstance(prepared, PreparedMix) else {"": prepared}
    result = Survey(prepared.manifest["name"], prepared.manifest["rows_read"], detector=importlib.util.find_spec("py3langid") is not None)
    tell = language_teller()
    sizes = {source: _ImageSizes(part) for source, part in sets.items()}
    found: list[Hashes] = []
    for split in prepared.splits:
        for source, rows in parts_of(prepared.split(split)).items():
            part, hashes = _read(source, split, rows, sizes[source], tell)
            result.parts.append(part)
            found.append(hashes)
    repeats, contradictions = find_repeats(result.parts, found), find_contradictions(result.parts, found)
    result.repeats, result.repeated, result.repeated_long = repeats.listed, repeats.number, repeats.long
    result.contradictions, result.contradicting, result.contradicting_rows = contradictions.listed, contradictions.number, contradictions.rows
    for source, one in sets.items():
        result.left_out += find_left_out(source, one)
        result.alike += find_alike(source, one)
        own = one.manifest.get("near_duplicates")
        result.near = None if own is None or result.near is None else result.near + own
        result.notes += [f"{source}: {note}" if source else note for note in one.manifest["notes"]]
    if isinstance(prepared, PreparedMix):
        result.notes += prepared.manifest["notes"]
        result.alike += find_alike("", prepared)
        result.near = None if result.near is None else result.near + prepared.across.number
    return result


class _ImageSizes:
    """Width and height of the images of a prepared set, found by the first 8 bytes of their sha256."""

    def __init__(self, prepared: PreparedData) -> None:
        digests, sizes = array("Q"), array("i")
        for image in prepared.images():
            digests.append(_prefix(image["sha256"]))
            sizes.extend((image["width"], image["height"]))
        self.digests, first = np.unique(np.frombuffer(digests, np.uint64) if digests else np.zeros(0, np.uint64), return_index=True)
        self.sizes = (np.frombuffer(sizes, np.int32) if sizes else np.zeros(0, np.int32)).reshape(-1, 2)[first]

    def of(self, digests: array[int]) -> np.ndarray:
        """(different images, 2) int32."""
        wanted = np.unique(np.frombuffer(digests, np.uint64)) if digests else np.zeros(0, np.uint64)
        return self.sizes[np.searchsorted(self.digests, wanted)]


def _prefix(sha256: str) -> int:
    return int(sha256[:16], 16)


def _read(source: str, split: str, rows: Sequence[Sample], sizes: _ImageSizes, tell: Any) -> tuple[Part, Hashes]:
    images, characters, words = array("Q"), array("i"), array("i")
    text, question, answer, exact = array("Q"), array("Q"), array("Q"), array("Q")
    without = several = boxes = 0
    for row in rows:
        last = row.answer_text
        images.extend(map(_prefix, row.sha256))
        without, several, boxes = without + (not row.images), several + (len(row.images) > 1), boxes + bool(row.regions)
        characters.append(len(last))
        words.append(len(last.split()))
        turns = [(m["role"], message_text(m)) for m in row.messages]
        text.append(_hash(turns))
        question.append(_hash([*row.sha256, *turns[:-1]]) if row.prompt_text.strip() else 0)
        answer.append(_hash(" ".join(last.casefold().split()).rstrip(".")))
        exact.append(_hash(last))
    _, first, counts = np.unique(_numbers(exact), return_index=True, return_counts=True)
    order = np.lexsort((first, -counts))[:TOP]  # of equally frequent answers the first one comes first
    top = [(rows[int(first[i])].answer_text, int(counts[i])) for i in order]
    languages = Counter(tell(" ".join(message_text(m) for m in row.messages if m["role"] != "system")) for row in spread(rows, LANGUAGE_ROWS))
    part = Part(source, split, rows, sizes.of(images), np.array(characters, np.int32), np.array(words, np.int32), top, len(counts), languages, without, several, boxes)
    return part, Hashes(_numbers(text), _numbers(question), _numbers(answer))


def _numbers(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, np.uint64) if values else np.zeros(0, np.uint64)


def _hash(value: object) -> int:
    """64 bits; never 0, which stands for nothing."""
    text = json.dumps(value, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


def shares(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """(name, number, share of all) by number."""
    ordered = sorted(counts, key=lambda item: -item[1])
    whole = sum(n for _, n in ordered)
    return [(name, n, n / whole) for name, n in ordered] if whole else []
