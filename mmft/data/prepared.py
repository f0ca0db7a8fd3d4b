"""PreparedData: opens a prepared data set on disk, memory-mapped; later verbs read nothing else."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np

from ..common.errors import UserError
from .images import MAX_PIXELS
from .near import LOOK
from .sample import Sample
from .sources.base import DISTANCE

if TYPE_CHECKING:
    from typing import NotRequired  # Python 3.11; in 3.10 only mypy reads it

    import pyarrow as pa

TOGETHER = 256  # rows converted at once when a split is read from its beginning to its end
LOOKS = "looks.arrow"  # what the images look like
NEAR = "near_duplicates.jsonl"  # the closest pairs, an AlikePair in each line
FORMAT = 2  # of the files below; a set with another number is prepared again


class SplitCounts(TypedDict):
    rows: int
    images: int


class Manifest(TypedDict):
    """manifest.json: what the set was made of, and its counts.

    merged: rows that became part of another row (data.captions=group). archives: size and time of the archives beside the table,
    if images were read from one or are missing. boxes: rows with boxes or points; unusable: rows dropped because they cannot be used, which
    data.max_bad_share limits; near_duplicates: pairs of images that look alike. All three are absent in sets of earlier versions, the last one
    also with data.near_distance=null. rejected, bad: rows with a rejected answer, and rows whose answer is labelled bad; absent where there are none.
    """

    format: int
    name: str
    key: str
    source: dict[str, Any]
    stamp: dict[str, Any]
    fingerprint: str
    root: str | None
    splits: dict[str, SplitCounts]
    images: int
    rows_read: int
    unusable: NotRequired[int]
    dropped: int
    changed: int
    merged: int
    archives: dict[str, list[int]] | None
    reasons: dict[str, int]
    notes: list[str]
    boxes: NotRequired[int]
    near_duplicates: NotRequired[int]
    rejected: NotRequired[int]
    bad: NotRequired[int]
    created: str
    versions: dict[str, str]


class ImageFile(TypedDict):
    """One row of images.arrow. path: below the data root, or below the prepared directory if `stored` (copied into it).

    url: the sha256 of the URL it was downloaded from, or "".
    """

    path: str
    sha256: str
    bytes: int
    width: int
    height: int
    mtime_ns: int
    stored: bool
    url: str


class AlikeImage(TypedDict):
    """image: a path as in images.arrow, stored: likewise. splits: those that show it. source: of a mix."""

    image: str
    stored: bool
    splits: list[str]
    source: NotRequired[str]


class AlikePair(TypedDict):
    """One line of near_duplicates.jsonl: two images that look alike. bits: in which their hashes differ."""

    bits: int
    images: list[AlikeImage]


class PreparedData:
    """A directory that `prepare` wrote.

    manifest: see Manifest. fingerprint: one hash of all rows and image contents, independent of paths.
    splits: {"train": number of rows, ...}, only those with rows. Raises UserError if the directory is not a prepared set.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self.manifest: Manifest = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{self.path}: not a prepared data set (no manifest.json); `mmft prepare data=...` makes one") from None
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / 'manifest.json'}: cannot be read ({error}); remove the folder and prepare again") from None
        if self.manifest.get("format") != FORMAT:
            raise UserError(f"{self.path}: was prepared by another version of mmft; remove the folder and prepare again")
        self.fingerprint: str = self.manifest["fingerprint"]
        self.splits: dict[str, int] = {name: part["rows"] for name, part in self.manifest["splits"].items()}
        self._open: list[Rows] = []

    def split(self, name: str) -> Sequence[Sample]:
        """The rows of one split. Raises UserError if there is no such split."""
        if name not in self.splits:
            raise UserError(f"{self.path.name}: has no {name} split, only {', '.join(self.splits)}; "
                            f"hold rows out with data.splits.{name}=... or choose another split")
        rows = Rows(self.path, name, self.splits[name], self.manifest["root"], self.manifest["source"].get("max_pixels", MAX_PIXELS))
        self._open.append(rows)
        return rows

    def images(self) -> Iterator[ImageFile]:
        """Every image file of the set."""
        import pyarrow as pa

        with pa.OSFile(str(self.path / "images.arrow"), "rb") as source:
            for batch in pa.ipc.open_stream(source):
                yield from batch.to_pylist()

    def alike(self) -> Iterator[AlikePair]:
        """The closest pairs of images that look alike; there is no file if there are none, and in sets of earlier versions."""
        if (self.path / NEAR).is_file():
            with (self.path / NEAR).open(encoding="ascii") as file:
                yield from map(json.loads, file)

    @property
    def has_looks(self) -> bool:
        """Whether the set has kept what its images look like: not in sets of earlier versions, and not with data.near_distance=null."""
        return (self.path / LOOKS).is_file()

    @property
    def near_distance(self) -> int:
        """data.near_distance; of a set that has looked for near-duplicates."""
        return int(self.manifest["source"].get("near_distance", DISTANCE))

    def looks(self) -> tuple[pa.Array, np.ndarray]:
        """(sha256, what it looks like) of the images of usable rows, each content once: (images,) text, (images,) near.LOOK."""
        import pyarrow as pa

        with pa.memory_map(str(self.path / LOOKS)) as file:
            table = pa.ipc.open_stream(file).read_all().combine_chunks()
        if not table.num_rows:
            return pa.array([], pa.string()), np.zeros(0, LOOK)
        looks = table["look"].chunk(0)
        return table["sha256"].chunk(0), np.frombuffer(looks.buffers()[1], LOOK, len(looks), looks.offset * LOOK.itemsize)

    def root_of(self, stored: bool) -> str:
        """The folder that the paths of images are relative to."""
        return self.path.resolve().as_posix() if stored else self.manifest["root"] or ""

    def describe(self) -> list[str]:
        """The set in a few lines for the user: size, splits, what was dropped or changed and why."""
        m = self.manifest
        parts = ", ".join(f"{name} {part['rows']} rows of {part['images']} images" for name, part in m["splits"].items())
        lines = [f"{m['name']}: {m['rows_read']} rows read, {m['images']} images; {parts}", f"fingerprint {self.fingerprint[:12]}, in {self.path}"]
        if m["dropped"] or m["changed"]:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(m["reasons"].items(), key=lambda k: -k[1]))
            lines.append(f"{m['dropped']} rows dropped, {m['changed']} changed ({kinds}); each is listed in {self.path / 'report.jsonl'}")
        return lines + m["notes"]

    def held_out_images(self) -> pa.Array:
        """The different content hashes of the images of validation and test rows."""
        import pyarrow as pa

        return pa.chunked_array([self.image_hashes(name) for name in self.splits if name != "train"], pa.string()).unique()

    def image_hashes(self, split: str) -> pa.Array:
        """The different content hashes of the images of a split, which the set need not have."""
        import pyarrow as pa

        return pa.chunked_array([hashes.flatten() for hashes in self._image_hashes(split)] if split in self.splits else [], pa.string()).unique()

    def rows_that_show(self, images: pa.Array) -> set[int]:
        """The numbers of the training rows with one of these images (content hashes)."""
        import pyarrow.compute as pc

        rows: set[int] = set()
        start = 0
        for hashes in self._image_hashes("train") if len(images) and "train" in self.splits else ():
            shown = pc.is_in(hashes.flatten(), value_set=images)
            if shown.true_count:
                rows.update(start + row for row in pc.list_parent_indices(hashes).filter(shown).to_pylist())
            start += len(hashes)
        return rows

    def _image_hashes(self, split: str) -> Iterator[pa.ListArray]:
        import pyarrow as pa

        with pa.memory_map(str(self.path / f"{split}.arrow")) as file:
            for batch in pa.ipc.open_stream(file):
                yield batch["sha256"]

    def close(self) -> None:
        """Unmap the files; Windows does not move a directory while one of its files is mapped."""
        for rows in self._open:
            rows.close()
        self._open.clear()


class Rows(Sequence[Sample]):
    """The samples of one split, by number: memory-mapped, picklable, the same in every worker process."""

    def __init__(self, path: Path, name: str, length: int, root: str | None, max_pixels: int = MAX_PIXELS) -> None:
        self.path, self.name, self._length, self._root, self._max_pixels = path, name, length, root, max_pixels
        self._batches: list[pa.RecordBatch] | None = None  # views of the mapped file
        self._ends: list[int] = []  # number of rows up to the end of each batch
        self._own: str | None = None  # the prepared directory as a posix path, once it is known

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            raise TypeError("rows are taken one at a time, by number")
        if not -self._length <= index < self._length:
            raise IndexError(f"{self.name} has {self._length} rows, not a row {index}")
        return self._sample(self._row(index % self._length))

    def _sample(self, row: dict[str, Any]) -> Sample:
        # images that came as bytes lie in the prepared directory, wherever that is now
        if self._own is None:
            self._own = self.path.resolve().as_posix()
        root = self._own if row["stored"] else self._root or ""
        return Sample(row["id"], tuple(row["images"]), json.loads(row["messages"]), tuple(row["references"]), root, tuple(row["sha256"]),
                      self._max_pixels, choices=tuple(row.get("choices") or ()), rejected=row.get("rejected") or "", label=row.get("label"))  # fmt: skip

    def _mapped(self) -> list[pa.RecordBatch]:
        import pyarrow as pa

        if self._batches is None:
            with pa.memory_map(str(self.path / f"{self.name}.arrow")) as file:
                self._batches = list(pa.ipc.open_stream(file))  # maps the batches without reading their rows
            self._ends = list(accumulate(batch.num_rows for batch in self._batches))
        return self._batches

    def _row(self, index: int) -> dict[str, Any]:
        batches = self._mapped()
        n = bisect_right(self._ends, index)
        batch = batches[n]
        return batch.slice(index - self._ends[n] + batch.num_rows, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[Sample]:
        return (self._sample(row) for batch in self._mapped() for start in range(0, batch.num_rows, TOGETHER) for row in batch.slice(start, TOGETHER).to_pylist())

    def close(self) -> None:
        self._batches = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_batches": None}  # each worker maps the file itself
