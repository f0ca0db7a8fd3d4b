"""Assign rows to splits by image content: an image is never in two splits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..common.errors import UserError
from .sources.base import Splits

TRAIN, VALIDATION, TEST, DROPPED, MERGED = 0, 1, 2, 3, 4
NAMES = ("train", "validation", "test")
# Names that data sets use for their splits; COCO's "restval" are images meant for training.
ALIASES = {
    "train": TRAIN, "training": TRAIN, "trainval": TRAIN, "restval": TRAIN,
    "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION, "dev": VALIDATION, "eval": VALIDATION,
    "test": TEST, "testing": TEST,
}


@dataclass
class Assignment:
    """codes: (rows,) int8 of TRAIN, VALIDATION, TEST, DROPPED or MERGED (into an earlier row); dropped: row -> reason; notes: lines for the user."""

    codes: np.ndarray
    dropped: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def assign_kept(kept: np.ndarray, given: np.ndarray, offsets: np.ndarray, contents: np.ndarray, digests: Iterable[bytes], splits: Splits,
                alike: np.ndarray | None = None) -> Assignment:
    """`assign` for the rows of the mask `kept` (rows,) alone; the others are MERGED. Raises UserError."""
    if kept.all():
        return assign(given, offsets, contents, digests, splits, alike)
    sizes = np.diff(offsets)
    part = assign(given[kept], np.concatenate([[0], np.cumsum(sizes[kept])]), contents[np.repeat(kept, sizes)], digests, splits, alike)
    rows = np.flatnonzero(kept)
    codes = np.full(len(given), MERGED, dtype=np.int8)
    codes[rows] = part.codes
    return Assignment(codes, {int(rows[row]): reason for row, reason in part.dropped.items()}, part.notes)


def first_of(prompts: np.ndarray, given: np.ndarray) -> np.ndarray:
    """(rows,) bool: the first row of each prompt key and given split."""
    first = np.zeros(len(prompts), dtype=bool)
    for code in np.unique(given):
        rows = np.flatnonzero(given == code)
        first[rows[np.unique(prompts[rows], return_index=True)[1]]] = True
    return first


def assign(given: np.ndarray, offsets: np.ndarray, contents: np.ndarray, digests: Iterable[bytes], splits: Splits,
           alike: np.ndarray | None = None) -> Assignment:
    """The split of every row.

    given: (rows,) int8, the split code that a row came with, -1 for none. contents: image content numbers of all rows in
    sequence, row i's at offsets[i]:offsets[i + 1] (offsets: (rows + 1,)). digests: sha256 of content 0, 1, ...
    alike: (contents,) the number of a content that stands for it: contents with one number are never in two splits; None: each for itself.
    Raises UserError if train or a requested split would have no rows.
    """
    result = Assignment(np.where(given < 0, TRAIN, given).astype(np.int8))
    n_contents = int(contents.max()) + 1 if len(contents) else 0
    if (given >= 0).any():
        _drop_leaks(result, offsets, contents, n_contents, "image in two splits", "an image")
        if alike is not None:
            _drop_leaks(result, offsets, alike[contents], n_contents, "near-duplicate in two splits", "a near-duplicate of an image")
    pool = np.flatnonzero(result.codes == TRAIN)
    wanted = {TEST: splits.test, VALIDATION: splits.validation}
    for code in (TEST, VALIDATION):
        if (given == code).any():
            if wanted[code]:
                result.notes.append(f"{NAMES[code]}: the data's own split is used, data.splits.{NAMES[code]}={wanted[code]} is not")
            wanted[code] = 0
    total, reason = len(pool), ""
    if any(wanted.values()):
        groups = _groups(pool, offsets, contents if alike is None else alike[contents], n_contents)
        order = _order(pool, groups, offsets, contents, digests, splits)
        for code in (TEST, VALIDATION):  # by=last: the very last rows are the test rows
            if wanted[code]:
                asked = wanted[code]
                count = asked if isinstance(asked, int) else int(asked * total + 0.5)
                order = _cut(result, pool, groups, order, code, count, _together(alike))
        smallest = int(np.bincount(groups).min()) if total else 0
        if smallest > 1:
            reason = f"; {_together(alike)} stay together, and the fewest that do are {smallest}"
    for code in (TRAIN, VALIDATION, TEST):
        needed = code == TRAIN or wanted.get(code) or (given == code).any()
        if needed and not (result.codes == code).any():
            raise UserError(f"the {NAMES[code]} split has no rows ({total} rows to divide, "
                            f"data.splits.validation={splits.validation} data.splits.test={splits.test}{reason}); "
                            "change how many are held out or give more data")
    return result


def _together(alike: np.ndarray | None) -> str:
    return "rows that share an image" + (" or show near-duplicates" if alike is not None else "")


def _drop_leaks(result: Assignment, offsets: np.ndarray, contents: np.ndarray, n_contents: int, kind: str, what: str) -> None:
    """Drop validation rows that show a test image, then training rows that show a held-out one."""
    codes, held_out = result.codes, np.zeros(n_contents, dtype=bool)
    for code in (TEST, VALIDATION, TRAIN):
        for row in np.flatnonzero(codes == code):
            if held_out[contents[offsets[row]:offsets[row + 1]]].any():
                codes[row] = DROPPED
                result.dropped[int(row)] = f"{kind}: this {NAMES[code]} row shows {what} of a held-out split"
        for row in np.flatnonzero(codes == code):
            held_out[contents[offsets[row]:offsets[row + 1]]] = True


def _groups(pool: np.ndarray, offsets: np.ndarray, contents: np.ndarray, n_contents: int) -> np.ndarray:
    """(pool,) int64: a group number; rows that share images, directly or through other rows, are in one group."""
    parent = np.arange(n_contents, dtype=np.int64)

    def find(item: int) -> int:
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    sizes = offsets[pool + 1] - offsets[pool]
    for row in pool[sizes > 1]:
        first = find(contents[offsets[row]])
        for content in contents[offsets[row] + 1:offsets[row + 1]]:
            parent[find(content)] = first
    while (parent != parent[parent]).any():
        parent = parent[parent]
    groups = n_contents + np.arange(len(pool), dtype=np.int64)  # a row without images is a group of its own
    shown = sizes > 0
    groups[shown] = parent[contents[offsets[pool[shown]]]]
    return np.unique(groups, return_inverse=True)[1].reshape(-1)


def _order(pool: np.ndarray, groups: np.ndarray, offsets: np.ndarray, contents: np.ndarray,
           digests: Iterable[bytes], splits: Splits) -> np.ndarray:
    """Group numbers in the order in which they are held out."""
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    if splits.by == "last":
        last = np.zeros(n_groups, dtype=np.int64)
        np.maximum.at(last, groups, pool)
        return np.argsort(-last, kind="stable")
    # drawn from the image's hash: the same on every machine, independent of row order and file names
    salt = f"{splits.seed}:".encode()
    draws = np.fromiter((_draw(salt + digest) for digest in digests), np.uint64)
    group_of_row = np.full(len(offsets) - 1, -1, dtype=np.int64)
    group_of_row[pool] = groups
    group_of_content = np.repeat(group_of_row, np.diff(offsets))
    pooled = group_of_content >= 0
    key = np.full(n_groups, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(key, group_of_content[pooled], draws[contents[pooled]])
    for i in np.flatnonzero(offsets[pool + 1] == offsets[pool]):  # rows without images
        key[groups[i]] = _draw(salt + b"row %d" % pool[i])
    return np.argsort(key, kind="stable")


def _draw(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


def _cut(result: Assignment, pool: np.ndarray, groups: np.ndarray, order: np.ndarray, code: int, count: int, together: str) -> np.ndarray:
    """Move whole groups with `count` rows in total to split `code`; returns the order of the remaining groups."""
    sizes = np.bincount(groups, minlength=int(groups.max()) + 1)
    chosen = choose(sizes[order], count)
    taken = order[chosen]
    rows = pool[np.isin(groups, taken)]
    result.codes[rows] = code
    if len(rows) != count and len(rows):
        result.notes.append(f"{NAMES[code]}: {len(rows)} rows, {count} were asked for; {together} stay together")
    return order[~chosen]


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
