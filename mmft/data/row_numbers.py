"""RowNumbers: what the division into splits needs of each row, in files, so that memory use does not grow with the rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

TYPES: dict[str, np.dtype] = {"given": np.dtype("i1"), "sizes": np.dtype("<i4"), "contents": np.dtype("<i4"), "prompts": np.dtype("<i8")}  # one file each: 17 bytes for a row of one image
AT_ONCE = 1 << 13  # rows read at once
KEYS = 1 << 17  # different prompt keys held at once, on average
KEY_BITS = 63
PLACED = np.dtype([("key", "<i8"), ("row", "<i8")])  # a prompt key and the row that has it


def find(keys: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place of each key in `known`, whether it is there). known: sorted, none twice, not empty; the place of a key that is not there says nothing."""
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    return places, known[places] == keys


@dataclass
class Part:
    """Some rows in sequence, from row `start` on. given: (rows,) the split code that each came with, -1 for none. sizes: (rows,) images of each.

    contents: (images,) the content numbers of their images, row after row.
    """

    start: int
    given: np.ndarray
    sizes: np.ndarray
    contents: np.ndarray

    def of(self, values: np.ndarray) -> np.ndarray:
        """The values of these rows, as a view. values: of all rows."""
        return values[self.start : self.start + len(self.given)]

    @property
    def owners(self) -> np.ndarray:
        """(images,) the place in this part of the row that shows each image."""
        return np.repeat(np.arange(len(self.given)), self.sizes)


class RowNumbers:
    """Written row after row, then read in parts."""

    def __init__(self, folder: Path):
        self.paths = {name: folder / f"rows.{name}" for name in TYPES}
        self._sorted = folder / "rows.sorted"
        self._files = {name: path.open("wb") for name, path in self.paths.items()}
        self.count = 0
        self.n_contents = 0  # one more than the largest content number

    def add(self, given: Sequence[int], sizes: Sequence[int], contents: Sequence[int], prompts: Sequence[int]) -> None:
        """Append rows. prompts: their prompt keys (row_text.prompt_key). The rest: see Part."""
        for name, values in (("given", given), ("sizes", sizes), ("contents", contents), ("prompts", prompts)):
            self._files[name].write(np.array(values, TYPES[name]).tobytes())
        self.count += len(given)
        self.n_contents = max(self.n_contents, max(contents, default=-1) + 1)

    def close(self) -> None:
        """Nothing can be added any more; the files can be read."""
        for file in self._files.values():
            file.close()

    def remove(self) -> None:
        for path in (*self.paths.values(), self._sorted):
            path.unlink(missing_ok=True)

    def given(self) -> np.ndarray:
        """(rows,) int8: the split code that each row came with, -1 for none."""
        return np.fromfile(self.paths["given"], TYPES["given"])

    def parts(self) -> Iterator[Part]:
        """All rows in order."""
        with self.paths["given"].open("rb") as given, self.paths["sizes"].open("rb") as sizes, self.paths["contents"].open("rb") as contents:
            for start in range(0, self.count, AT_ONCE):
                own = np.fromfile(sizes, TYPES["sizes"], AT_ONCE)
                yield Part(start, np.fromfile(given, TYPES["given"], AT_ONCE), own, np.fromfile(contents, TYPES["contents"], int(own.sum())))

    def prompts(self) -> Iterator[np.ndarray]:
        """The prompt keys of all rows in order."""
        with self.paths["prompts"].open("rb") as file:
            for _ in range(0, self.count, AT_ONCE):
                yield np.fromfile(file, TYPES["prompts"], AT_ONCE)

    def by_prompt(self) -> Iterator[Bucket]:
        """All rows, those with one prompt key in one bucket; the keys of a bucket are below those of the next."""
        bits = ((self.count - 1) // KEYS).bit_length() if self.count else 0
        shift, lengths = KEY_BITS - bits, np.zeros(1 << bits, np.int64)
        for keys in self.prompts():
            lengths += np.bincount(keys >> shift, minlength=len(lengths))
        ends = np.cumsum(lengths)
        places, start = ends - lengths, 0
        with self._sorted.open("wb") as file:
            for keys in self.prompts():
                buckets = keys >> shift
                order = np.argsort(buckets, kind="stable")
                placed = np.empty(len(keys), PLACED)
                placed["key"], placed["row"] = keys[order], order + start
                edges = np.concatenate([[0], np.cumsum(np.bincount(buckets, minlength=len(lengths)))])
                for bucket in np.flatnonzero(np.diff(edges)):
                    file.seek(int(places[bucket]) * PLACED.itemsize)
                    file.write(placed[edges[bucket] : edges[bucket + 1]].tobytes())
                    places[bucket] += edges[bucket + 1] - edges[bucket]
                start += len(keys)
        for end, length in zip(ends.tolist(), lengths.tolist()):
            yield Bucket(self._sorted, end - length, length)


@dataclass
class Bucket:
    """The rows with the prompt keys of a range."""

    path: Path
    first: int
    length: int

    def parts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, their prompt keys), in the order of the rows."""
        with self.path.open("rb") as file:
            file.seek(self.first * PLACED.itemsize)
            for start in range(0, self.length, AT_ONCE):
                placed = np.fromfile(file, PLACED, min(AT_ONCE, self.length - start))
                yield placed["row"], placed["key"]

    def repeated(self) -> np.ndarray:
        """The keys that more than one row has, sorted."""
        seen = repeated = np.zeros(0, np.int64)
        for _, keys in self.parts():
            new, counts = np.unique(keys, return_counts=True)
            repeated = np.union1d(repeated, new[(counts > 1) | np.isin(new, seen)])
            seen = np.union1d(seen, new)
        return repeated
