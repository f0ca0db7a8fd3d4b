"""Source: what every data source has in common; a subclass reads one format, in one file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ...common.errors import UserError, nearest
from ..download import Download
from ..sample import Bad, Row


@dataclass(frozen=True)
class Splits:
    """How rows are held out: `validation` and `test` as a count of rows (int) or a share (float below 1).

    by: `last` takes rows from the end, test after validation; `random` draws, the same on every machine for a seed.
    """

    validation: int | float = 0
    test: int | float = 0
    by: str = "random"
    seed: int = 42

    def __post_init__(self) -> None:
        for key in ("validation", "test"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (isinstance(value, float) and value >= 1):
                raise UserError(f"data.splits.{key}={value}: give a number of rows (100) or a share below one (0.1)")
        if self.by not in ("random", "last"):
            raise UserError(f"data.splits.by={self.by}: must be random or last")


@dataclass(kw_only=True)
class Source:
    """The keys that all data sources share.

    name: the word for this set in file names. splits: see Splits. max_bad_share: stop if a larger part of the rows
    read is bad. root: the folder image paths are relative to, and must lie below (null: the source knows).
    limit: use only the first so many rows. text_only: keep rows without any image. download: see Download; null: rows
    that name an image by URL are dropped.
    """

    name: str = "data"
    splits: Splits = field(default_factory=Splits)
    max_bad_share: float = 0.01
    root: str | None = None
    limit: int | None = None
    text_only: bool = False
    download: Mapping[str, Any] | Download | None = None

    def __post_init__(self) -> None:
        if self.download is not None and not isinstance(self.download, Download):
            self.download = from_keys(Download, self.download, "data.download")
        if not isinstance(self.splits, Splits):
            self.splits = from_keys(Splits, self.splits, "data.splits")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={self.max_bad_share}: must lie between 0 and 1")
        if self.limit is not None and (isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1):
            raise UserError(f"data.limit={self.limit}: must be a whole number above 0, or null for all")
        if not self.name or any(c in '<>:"/\\|?*' or ord(c) < 32 for c in self.name) or self.name.strip(". ") != self.name:
            raise UserError(f"data.name={self.name!r}: use letters, digits, - and _; it becomes part of a folder's name")

    # -- what a subclass gives --

    def rows(self) -> Iterator[Row | Bad]:
        """The rows in their order, one at a time. Errors raised: UserError if a file, column or folder is missing."""
        raise NotImplementedError

    def stamp(self) -> dict[str, Any]:
        """What tells this content from another without reading it all: paths, sizes, times, hub revisions (JSON)."""
        return {}

    def data_root(self) -> Path | None:
        """Where relative image paths start; None for a source whose images are all bytes."""
        return Path(self.root) if self.root else None

    def total(self) -> int | None:
        """About how many rows there are, for the progress bar; None if not known beforehand."""
        return None

    # -- what prepare uses --

    def first_rows(self) -> Iterator[Row | Bad]:
        """The rows up to `limit`."""
        return islice(self.rows(), self.limit)

    def export(self, folder: Path, final: Path, samples: Iterator[Any]) -> None:
        """Write further files of this source's own into the prepared `folder`, which will be moved to `final`."""

    def settings(self) -> dict[str, Any]:
        """All keys as JSON values, for the manifest and the key of the prepared set."""
        keys = dataclasses.asdict(self)
        if self.download is None:
            del keys["download"]  # sets that were prepared before there was this key keep theirs
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **keys}


def from_keys(cls: type, values: Mapping[str, Any] | None, where: str) -> Any:
    """A dataclass from a mapping of a config. Errors raised: UserError naming a key it does not have."""
    known = [f.name for f in dataclasses.fields(cls)]
    for key in values or {}:
        if key not in known:
            raise UserError(f"{where}.{key}: no such key.{nearest(str(key), known)} There are: {', '.join(known)}.")
    return cls(**(values or {}))


def file_stamp(path: Path) -> dict[str, Any]:
    """Path, size and time of a file. Errors raised: UserError if it cannot be read."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return {"path": path.resolve().as_posix(), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
