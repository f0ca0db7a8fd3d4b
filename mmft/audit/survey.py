"""Survey: one pass over a prepared data set counts its rows, images, answers and languages by source and split, and finds texts that occur twice."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import unicodedata
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.mix import PreparedMix
from ..data.sample import message_text
from ..data.selection import parts_of, spread

if TYPE_CHECKING:
    from ..data.prepared import PreparedData
    from ..data.sample import Sample

SHARES = (0, 50, 90, 99, 100)  # percentiles of sizes and lengths
TOP = 10  # most frequent answers of a source and split
LISTED = 1000  # rows listed of each kind of finding
LANGUAGE_ROWS = 2000  # rows of a source and split whose language is told, evenly spaced
LETTERS = 20  # a text with fewer letters is too short to tell its language
SURE = 0.8  # the least probability with which a language is named
LONG = 8  # words of an answer that two rows hardly share by chance
EXAMPLES = 3  # rows named for each reason why rows were left out


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
    found: list[_Hashes] = []
    for split in prepared.splits:
        for source, rows in parts_of(prepared.split(split)).items():
            part, hashes = _read(source, split, rows, sizes[source], tell)
            result.parts.append(part)
            found.append(hashes)
    _find_repeats(result, found)
    _find_contradictions(result, found)
    for source, one in sets.items():
        result.left_out += _left_out(source, one)
        result.alike += _alike(source, one)
        own = one.manifest.get("near_duplicates")
        result.near = None if own is None or result.near is None else result.near + own
        result.notes += [f"{source}: {note}" if source else note for note in one.manifest["notes"]]
    if isinstance(prepared, PreparedMix):
        result.notes += prepared.manifest["notes"]
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


@dataclass
class _Hashes:
    """(rows,) uint64 each: of all texts of a row, of its images and question (0 without a question), of its answer."""

    text: np.ndarray
    question: np.ndarray
    answer: np.ndarray


def _read(source: str, split: str, rows: Sequence[Sample], sizes: _ImageSizes, tell: Any) -> tuple[Part, _Hashes]:
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
    return part, _Hashes(_numbers(text), _numbers(question), _numbers(answer))


def _numbers(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, np.uint64) if values else np.zeros(0, np.uint64)


def _hash(value: object) -> int:
    """64 bits; never 0, which stands for nothing."""
    text = json.dumps(value, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") or 1


def _find_repeats(result: Survey, found: list[_Hashes]) -> None:
    """Held-out rows whose whole text is that of a training row; long answers are listed first."""
    parts = result.parts
    training = [(number, hashes) for number, (part, hashes) in enumerate(zip(parts, found)) if part.split == "train"]
    if not training:
        return
    known, first = np.unique(np.concatenate([hashes.text for _, hashes in training]), return_index=True)
    ends = np.cumsum([len(hashes.text) for _, hashes in training])
    pairs: list[tuple[int, int, int, int]] = []  # (words, part, row, training row)
    for number, (part, hashes) in enumerate(zip(parts, found)):
        if part.split == "train":
            continue
        rows = np.flatnonzero(np.isin(hashes.text, known))
        result.repeated += len(rows)
        result.repeated_long += int((part.words[rows] >= LONG).sum())
        there = first[np.searchsorted(known, hashes.text[rows])]
        longest = np.argsort(-part.words[rows], kind="stable")[:LISTED]
        pairs += [(int(part.words[rows[i]]), number, int(rows[i]), int(there[i])) for i in longest]
    for words, number, row, there_row in sorted(pairs, key=lambda pair: -pair[0])[:LISTED]:
        n = int(np.searchsorted(ends, there_row, side="right"))
        inside = there_row - (int(ends[n - 1]) if n else 0)
        result.repeats.append(Repeat(parts[number].rows[row], parts[number].split, parts[training[n][0]].rows[inside], words))


def _find_contradictions(result: Survey, found: list[_Hashes]) -> None:
    """Questions about the same images with different answers."""
    question, answer = (np.concatenate([getattr(h, name) for h in found] or [np.zeros(0, np.uint64)]) for name in ("question", "answer"))
    part = np.repeat(np.arange(len(found)), [len(h.text) for h in found])
    starts = np.cumsum([0, *(len(h.text) for h in found)])
    order = np.lexsort((np.arange(len(question)), answer, question))
    order = order[question[order] != 0]
    if not len(order):
        return
    new_question = np.r_[True, question[order][1:] != question[order][:-1]]
    new_answer = new_question | np.r_[True, answer[order][1:] != answer[order][:-1]]
    group = np.cumsum(new_question) - 1
    answers = np.bincount(group, weights=new_answer).astype(int)
    result.contradicting = int((answers > 1).sum())
    result.contradicting_rows = int((answers[group] > 1).sum())
    first_row = np.minimum.reduceat(order, np.flatnonzero(new_question))
    for wanted in sorted(np.flatnonzero(answers > 1).tolist(), key=lambda g: int(first_row[g]))[:LISTED]:
        low, high = np.searchsorted(group, (wanted, wanted + 1))
        rows = np.sort(order[low:high][new_answer[low:high]])
        result.contradictions.append(Contradiction([(result.parts[part[i]].split, result.parts[part[i]].rows[int(i - starts[part[i]])]) for i in rows]))


def _left_out(source: str, prepared: PreparedData) -> list[LeftOut]:
    """The reasons of report.jsonl with their first rows."""
    examples: dict[str, list[tuple[str, str]]] = {}
    for line in _report(prepared):
        named = examples.setdefault(line["reason"].split(":")[0], [])
        if len(named) < EXAMPLES and line["action"] != "note":
            named.append((line["where"] or str(line["id"]), line["reason"]))
    reasons = sorted(prepared.manifest["reasons"].items(), key=lambda item: -item[1])
    return [LeftOut(f"{source}: {kind}" if source else kind, rows, examples.get(kind, [])) for kind, rows in reasons]


def _alike(source: str, prepared: PreparedData) -> Iterator[Alike]:
    """The listed pairs of a set; those in two splits first."""
    pairs = sorted(prepared.alike(), key=lambda pair: pair["images"][0]["splits"] == pair["images"][1]["splits"])
    for pair in pairs:
        images = [(prepared.root_of(i["stored"]), i["image"], ", ".join(f"{source}: {s}" if source else s for s in i["splits"]) or "left out") for i in pair["images"]]
        yield Alike(pair["bits"], images, pair["images"][0]["splits"] != pair["images"][1]["splits"])


def _report(prepared: PreparedData) -> Iterator[dict[str, Any]]:
    with (prepared.path / "report.jsonl").open(encoding="utf-8") as file:
        yield from map(json.loads, file)


# -- languages --

_SCRIPTS = ("LATIN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL", "CYRILLIC", "ARABIC", "DEVANAGARI", "GREEK", "THAI", "HEBREW", "BENGALI", "TAMIL")


def script(text: str) -> str:
    """The script of most letters of a text: `Latin`, `Chinese`, `Japanese`, ...; "" without letters."""
    counts = Counter(unicodedata.name(c, "").split(" ")[0].split("-")[0] for c in text if c.isalpha())
    kana = counts["HIRAGANA"] + counts["KATAKANA"]
    if kana and kana + counts["CJK"] >= max(counts.values()):
        return "Japanese"
    name = counts.most_common(1)[0][0] if counts else ""
    return {"CJK": "Chinese", "HANGUL": "Korean"}.get(name, name.capitalize() if name in _SCRIPTS else "other" if name else "")


def language_teller() -> Any:
    """text -> a name for its language: a code (en, de) where the package py3langid is installed and sure, else its script."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        return lambda text: f"{script(text)} letters" if script(text) else "no letters"
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def tell(text: str) -> str:
        written = script(text)
        if not written:
            return "no letters"
        if written in ("Chinese", "Japanese", "Korean"):
            return written
        if sum(c.isalpha() for c in text) < LETTERS:
            return f"short, {written} letters"
        code, probability = identifier.classify(text)
        return code if probability >= SURE else f"unsure, {written} letters"

    return tell


def shares(counts: Iterable[tuple[str, int]]) -> list[tuple[str, int, float]]:
    """(name, number, share of all) by number."""
    ordered = sorted(counts, key=lambda item: -item[1])
    whole = sum(n for _, n in ordered)
    return [(name, n, n / whole) for name, n in ordered] if whole else []
