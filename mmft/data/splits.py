"""Assign rows to splits by image content: an image is never in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from ..common.errors import UserError
from .row_numbers import AT_ONCE, Part, RowNumbers
from .sources.base import Splits

TRAIN, VALIDATION, TEST, MERGED, DROPPED = 0, 1, 2, 3, 4
NAMES = ("train", "validation", "test")
# Names that data sets use for their splits; COCO's "restval" are images meant for training.
ALIASES = {
    "train": TRAIN, "training": TRAIN, "trainval": TRAIN, "restval": TRAIN,
    "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION, "eval": VALIDATION,
    "test": TEST, "testing": TEST,
}


@dataclass
class Assignment:
    """codes: (rows,) int8 of TRAIN, VALIDATION, TEST, MERGED (into an earlier row), or DROPPED + n: dropped for reasons[n]. notes: lines for the user."""

    codes: np.ndarray
    reasons: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def reason(self, row: int) -> str:
        """Why a row is dropped."""
        return self.reasons[self.codes[row] - DROPPED]

    def count(self, code: int) -> int:
        """Rows of TRAIN, VALIDATION, TEST or MERGED."""
        return sum(int(np.count_nonzero(self.codes[start : start + AT_ONCE] == code)) for start in range(0, len(self.codes), AT_ONCE))


def later_rows(rows: RowNumbers) -> np.ndarray:
    """(rows,) bool: the rows that have the prompt key and the given split of an earlier one."""
    given, later = rows.given(), np.zeros(rows.count, dtype=bool)
    for bucket in rows.by_prompt():
        seen: dict[int, np.ndarray] = {}
        for numbers, keys in bucket.parts():
            codes = given[numbers]
            for code in np.unique(codes).tolist():
                own = np.flatnonzero(codes == code)
                different, first = np.unique(keys[own], return_index=True)
                before = seen.get(code, different[:0])
                later[numbers[own]] = True
                later[numbers[own[first[~np.isin(different, before)]]]] = False
                seen[code] = np.union1d(before, different)
    return later


def assign(rows: RowNumbers, digests: Iterable[bytes], splits: Splits, alike: np.ndarray | None = None, merged: np.ndarray | None = None) -> Assignment:
    """The split of every row. Memory: a byte a row, and some 40 bytes an image and a row without images.

    digests: sha256 of content 0, 1, ... alike: (contents,) the number of a content that stands for it: contents with one number are never in two
    splits; None: each for itself. merged: (rows,) bool, rows that are MERGED and count for nothing; None: no row.
    Raises UserError if train or a requested split would have no rows.
    """
    result = Assignment(np.full(rows.count, TRAIN, dtype=np.int8))
    if merged is not None:
        result.codes[merged] = MERGED
    came = np.zeros(len(NAMES), np.int64)  # rows of each split that the data gives
    for part in rows.parts():
        codes = part.of(result.codes)
        own = (part.given >= 0) & (codes != MERGED)
        codes[own] = part.given[own]
        came += np.bincount(part.given[own], minlength=len(NAMES))
    if came.any():
        _drop_leaks(result, rows, None, "image in two splits", "an image")
        if alike is not None:
            _drop_leaks(result, rows, alike, "near-duplicate in two splits", "a near-duplicate of an image")
    total = result.count(TRAIN)
    wanted = {TEST: splits.test, VALIDATION: splits.validation}
    for code in (TEST, VALIDATION):
        if came[code]:
            if wanted[code]:
                result.notes.append(f"{NAMES[code]}: the data's own split is used, data.splits.{NAMES[code]}={wanted[code]} is not")
            wanted[code] = 0
    reason = ""
    if any(wanted.values()):
        smallest = _hold_out(result, rows, digests, splits, alike, {code: asked if isinstance(asked, int) else int(asked * total + 0.5) for code, asked in wanted.items()})
        if smallest > 1:
            reason = f"; {_together(alike)} stay together, and the fewest that do are {smallest}"
    for code in (TRAIN, VALIDATION, TEST):
        needed = code == TRAIN or wanted.get(code) or came[code]
        if needed and not result.count(code):
            raise UserError(f"the {NAMES[code]} split has no rows ({total} rows to divide, "
                            f"data.splits.validation={splits.validation} data.splits.test={splits.test}{reason}); "
                            "change how many are held out or give more data")
    return result


def _together(alike: np.ndarray | None) -> str:
    return "rows that share an image" + (" or show near-duplicates" if alike is not None else "")


def _drop_leaks(result: Assignment, rows: RowNumbers, alike: np.ndarray | None, kind: str, what: str) -> None:
    """Drop validation rows that show a test image, then training rows that show a held-out one."""
    held_out = np.zeros(rows.n_contents, dtype=bool)
    for code in (TEST, VALIDATION, TRAIN):
        dropped = DROPPED + len(result.reasons)
        result.reasons.append(f"{kind}: this {NAMES[code]} row shows {what} of a held-out split")
        for part in rows.parts():
            codes = part.of(result.codes)
            shows = np.zeros(len(codes), dtype=bool)
            shows[part.owners[held_out[_contents(part, alike)]]] = True
            codes[shows & (codes == code)] = dropped
        for part in rows.parts():
            held_out[_contents(part, alike)[(part.of(result.codes) == code)[part.owners]]] = True


def _contents(part: Part, alike: np.ndarray | None) -> np.ndarray:
    return part.contents if alike is None else alike[part.contents]


def _hold_out(result: Assignment, rows: RowNumbers, digests: Iterable[bytes], splits: Splits, alike: np.ndarray | None, counts: dict[int, int]) -> int:
    """Move whole groups of the training rows to the splits of `counts`, as many rows as it says. Returns the number of rows of the smallest group."""
    groups = _Groups(rows, result.codes, alike)
    order = groups.order(digests, splits)
    splits_of = np.full(len(groups.sizes), TRAIN, dtype=np.int8)
    for code, count in counts.items():  # by=last: the very last rows are the test rows
        if count:
            chosen = choose(groups.sizes[order], count)
            splits_of[order[chosen]] = code
            found = int(groups.sizes[order[chosen]].sum())
            if found != count and found:
                result.notes.append(f"{NAMES[code]}: {found} rows, {count} were asked for; {_together(alike)} stay together")
            order = order[~chosen]
    for members in groups.members():
        result.codes[members.rows] = splits_of[members.groups]
    return int(groups.sizes.min()) if len(groups.sizes) else 0


@dataclass
class _Members:
    """Some training rows. rows: their numbers. groups: that of each. kept: the number of each among the rows that are not MERGED. alone: which show no image."""

    rows: np.ndarray
    groups: np.ndarray
    kept: np.ndarray
    alone: np.ndarray


class _Groups:
    """The training rows in groups: rows that share images, directly or through other rows, are in one; a row without images is one of its own.

    sizes: (groups,) rows of each. codes: those of TRAIN are read; what `members` has yielded may be changed.
    """

    def __init__(self, rows: RowNumbers, codes: np.ndarray, alike: np.ndarray | None) -> None:
        self.rows, self.codes, self.alike = rows, codes, alike
        self.used = np.zeros(rows.n_contents, dtype=bool)  # contents that these rows show
        self._roots = self._joined()
        roots = np.zeros(rows.n_contents, dtype=bool)
        shown = np.flatnonzero(self.used)
        roots[self._roots[shown if alike is None else alike[shown]]] = True
        self._numbers = np.cumsum(roots) - 1  # group of a root
        self._shown = int(roots.sum())
        self.sizes = np.zeros(self._shown + sum(int(members.alone.sum()) for members in self.members()), np.int64)
        for members in self.members():
            self.sizes += np.bincount(members.groups, minlength=len(self.sizes))

    def _joined(self) -> np.ndarray:
        """(contents,) the content that stands for the group of each. Also notes which are used."""
        parent = np.arange(self.rows.n_contents, dtype=np.int64)

        def find(item: int) -> int:
            while parent[item] != item:
                parent[item] = parent[parent[item]]
                item = parent[item]
            return item

        for part in self.rows.parts():
            pool, contents = part.of(self.codes) == TRAIN, _contents(part, self.alike)
            self.used[part.contents[pool[part.owners]]] = True
            ends = np.cumsum(part.sizes)
            for row in np.flatnonzero(pool & (part.sizes > 1)):
                own = contents[ends[row] - part.sizes[row] : ends[row]]
                first = find(own[0])
                for content in own[1:]:
                    parent[find(content)] = first
        while (parent != parent[parent]).any():
            parent = parent[parent]
        return parent

    def members(self) -> Iterator[_Members]:
        """All training rows in order."""
        kept_before, alone_before = 0, 0
        for part in self.rows.parts():
            codes = part.of(self.codes)
            kept = np.cumsum(codes != MERGED) - 1 + kept_before
            pool = np.flatnonzero(codes == TRAIN)
            ends, sizes = np.cumsum(part.sizes)[pool], part.sizes[pool]
            alone = sizes == 0
            groups = np.cumsum(alone) - 1 + alone_before + self._shown
            groups[~alone] = self._numbers[self._roots[_contents(part, self.alike)[(ends - sizes)[~alone]]]]
            kept_before, alone_before = int(kept[-1]) + 1, alone_before + int(alone.sum())
            yield _Members(pool + part.start, groups, kept[pool], alone)

    def order(self, digests: Iterable[bytes], splits: Splits) -> np.ndarray:
        """Group numbers in the order in which they are held out."""
        if splits.by == "last":
            last = np.zeros(len(self.sizes), dtype=np.int64)
            for members in self.members():
                np.maximum.at(last, members.groups, members.rows)
            return np.argsort(-last, kind="stable")
        # drawn from the image's hash: the same on every machine, independent of row order and file names
        salt = f"{splits.seed}:".encode()
        draws = np.fromiter((_draw(salt + digest) for digest in digests), np.uint64)
        key = np.full(len(self.sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
        shown = np.flatnonzero(self.used)
        np.minimum.at(key, self._numbers[self._roots[shown if self.alike is None else self.alike[shown]]], draws[shown])
        for members in self.members():
            for group, row in zip(members.groups[members.alone].tolist(), members.kept[members.alone].tolist()):
                key[group] = _draw(salt + b"row %d" % row)
        return np.argsort(key, kind="stable")


def _draw(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def choose(sizes: np.ndarray, count: int) -> np.ndarray:
    """(groups,) bool: groups, earlier ones preferred, whose sizes sum to `count`, or to the nearest sum below it.

    The sum is found by dynamic programming over the distinct sizes (a bounded knapsack with binary splitting).
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    chosen, left = np.zeros(len(sizes), dtype=bool), count
    for i, size in enumerate(sizes):  # taking what fits, in order, is exact unless large groups remain
        if left == 0:
            break
        if size <= left:
            chosen[i], left = True, left - size
    if left == 0:
        return chosen
    kinds, counts = np.unique(sizes[sizes <= count], return_counts=True)
    items = []  # (size, how many of it)
    for kind, available in zip(kinds.tolist(), counts.tolist()):
        step, available = 1, min(available, count // kind)
        while available > 0:
            take = min(step, available)
            items.append((kind, take))
            available, step = available - take, step * 2
    last_item = np.full(count + 1, -1, dtype=np.int64)  # the last item of one way to reach each sum
    reachable = np.zeros(count + 1, dtype=bool)
    reachable[0] = True
    for number, (kind, take) in enumerate(items):
        weight = kind * take
        new = np.zeros_like(reachable)
        new[weight:] = reachable[: count + 1 - weight]
        new &= ~reachable
        last_item[new] = number
        reachable |= new
    best = int(np.flatnonzero(reachable)[-1])
    if best == count - left:
        return chosen
    need: dict[int, int] = {}
    while best:
        kind, take = items[last_item[best]]
        need[kind] = need.get(kind, 0) + take
        best -= kind * take
    chosen[:] = False
    for kind, number in need.items():
        chosen[np.flatnonzero(sizes == kind)[:number]] = True
    return chosen
