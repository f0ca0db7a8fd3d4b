"""Source: what `prepare` needs from a data source. BaseSource: the keys that all data sources of a config share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar

from ...common.errors import UserError, nearest
from ..choices import as_choices
from ..download import Download
from ..images import MAX_PIXELS, MOST_PIXELS
from ..readers import files
from ..readers.files import ReadOptions
from ..regions import UNITS
from ..sample import BadRow, Row, Sample
from ..without import read_ids
from .objects import FORMS

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
# data.near_distance, in bits of a hash (data/near.py, which imports numpy, and a key is checked without it): more than the largest would join
# images that have nothing in common
DISTANCE, MOST_DISTANCE = 10, 16


@dataclass(frozen=True)
class Splits:
    """How many rows are held out: `validation` and `test` as a number of rows (int) or a share (float below 1).

    by: `last` takes rows from the end, test after validation; `random` draws by image content, the same on every machine for a seed.
    near: images that look alike (near_distance) are not in two splits either.
    """

    validation: int | float = 0
    test: int | float = 0
    by: str = "random"
    seed: int = 42
    near: bool = False

    def __post_init__(self) -> None:
        for key in ("validation", "test"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0 or (isinstance(value, float) and value >= 1):
                raise UserError(f"data.splits.{key}={value}: give a number of rows (100) or a share below one (0.1)")
        if self.by not in ("random", "last"):
            raise UserError(f"data.splits.by={self.by}: must be random or last")
        if not isinstance(self.near, bool):
            raise UserError(f"data.splits.near={self.near}: must be true or false")


class FileStamp(TypedDict):
    """Identifies the content of a file without reading it."""

    path: str
    size: int
    mtime_ns: int


Settings = dict[str, Any]  # all keys of a source as JSON values
Stamp = dict[str, Any]  # identifies the content of a source: FileStamps, hub revisions (JSON)


class Source(Protocol):
    """What `prepare` uses of a data source. BaseSource documents each member."""

    name: str
    splits: Splits
    max_bad_share: float
    max_pixels: int
    text_only: bool
    boxes_unit: str
    choices: str | Sequence[str] | None
    near_distance: int | None
    without: str | Sequence[str] | None
    limit: int | None

    @property
    def downloader(self) -> Download | None: ...
    @property
    def notes(self) -> list[str]: ...
    def limited_rows(self) -> Iterator[Row | BadRow]: ...
    def group_rows(self) -> bool: ...
    def settings(self) -> Settings: ...
    def stamp(self) -> Stamp: ...
    def data_root(self) -> Path | None: ...
    def image_boundary(self) -> Path | None: ...
    def total(self) -> int | None: ...
    def export(self, folder: Path, final: Path, samples: Iterator[Sample]) -> None: ...


@dataclass(kw_only=True)
class BaseSource:
    """The keys that all data sources share.

    name: the data set's name in file names. splits: see Splits. max_bad_share: preparation stops if a larger share of the rows is
    unusable. root: the folder that image paths are relative to and must lie below (null: the source's default). limit: use only the
    first rows. text_only: keep rows without images. max_pixels: width times height; larger images are dropped. too_long: what training does
    with rows longer than collator.max_length, refuse or drop. boxes: what the four numbers of a box are (objects.FORMS). boxes_unit: what
    the numbers of boxes and points count (regions.UNITS). download: see Download; null: rows that name an image by URL are dropped.
    weight: of a source of a mix, its part of the draws; 0: only its held-out rows are used. loss_weight: of a source of a mix, of the loss of
    its tokens.
    choices: the texts of which every answer is one, or letters (see mmft/data/choices.py); a row's own choices come first.
    near_distance: images are near-duplicates if their perceptual hashes differ in at most so many of 64 bits; null: none are looked for.
    without: row ids that are left out, a file or a list (mmft/data/without.py).

    `notes` receives lines for the user while rows are read.
    """

    name: str = "data"
    splits: Splits = field(default_factory=Splits)
    max_bad_share: float = 0.01
    root: str | None = None
    limit: int | None = None
    text_only: bool = False
    max_pixels: int = MAX_PIXELS
    too_long: str = "refuse"
    boxes: str = "xyxy"
    boxes_unit: str = "pixels"
    download: Mapping[str, Any] | Download | None = None
    weight: float | None = None
    loss_weight: float | None = None
    choices: str | Sequence[str] | None = None
    near_distance: int | None = DISTANCE
    without: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.notes: list[str] = []
        if isinstance(self.max_pixels, bool) or not isinstance(self.max_pixels, int) or not 0 < self.max_pixels <= MOST_PIXELS:
            raise UserError(f"data.max_pixels={self.max_pixels}: must be a number of pixels (width times height) from 1 to {MOST_PIXELS}")
        if self.download is not None and not isinstance(self.download, Download):
            self.download = from_keys(Download, self.download, "data.download")
        self.choices = as_choices(self.choices, "data.choices")
        if not isinstance(self.splits, Splits):
            self.splits = from_keys(Splits, self.splits, "data.splits")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(f"data.max_bad_share={self.max_bad_share}: must lie between 0 and 1")
        if self.too_long not in ("refuse", "drop"):
            raise UserError(f"data.too_long={self.too_long}: must be refuse or drop")
        for key, value, known in (("boxes", self.boxes, FORMS), ("boxes_unit", self.boxes_unit, UNITS)):
            if value not in known:
                raise UserError(f"data.{key}={value}: must be {' or '.join(known)}.{nearest(str(value), known)}")
        near = self.near_distance
        if near is not None and (isinstance(near, bool) or not isinstance(near, int) or not 0 <= near <= MOST_DISTANCE):
            raise UserError(f"data.near_distance={near}: must be a number of bits from 0 to {MOST_DISTANCE}, or null not to look for near-duplicates")
        if near is None and self.splits.near:
            raise UserError("data.splits.near=true: data.near_distance=null, so no near-duplicates are known; give a number of bits, or drop one of them")
        if self.limit is not None and (isinstance(self.limit, bool) or not isinstance(self.limit, int) or self.limit < 1):
            raise UserError(f"data.limit={self.limit}: must be a whole number above 0, or null for all")
        if not self.name or any(c in '<>:"/\\|?*' or ord(c) < 32 for c in self.name) or self.name.strip(". ") != self.name:
            raise UserError(f"data.name={self.name!r}: use letters, digits, - and _; it becomes part of a folder's name")

    # -- for subclasses --

    def read(self) -> Iterator[Row | BadRow]:
        """The rows in order, one at a time. Raises UserError if a file, column or folder is missing."""
        raise NotImplementedError

    def stamp(self) -> Stamp:
        """Identifies the content without reading all of it: paths, sizes, times, hub revisions (JSON)."""
        return {}

    def group_rows(self) -> bool:
        """Whether rows with the same images and prompt become one row, with all their answers as references."""
        return False

    def data_root(self) -> Path | None:
        """The folder that relative image paths start from; None for a source whose images are all bytes."""
        return Path(self.root) if self.root else None

    def image_boundary(self) -> Path | None:
        """The folder that image files must lie in: data.root; without it the working directory if it holds the data set, else the data root."""
        root = self.data_root()
        here = Path.cwd()
        if self.root or root is None or not root.resolve().is_relative_to(here) or here in (Path.home(), Path(here.anchor)):
            return root
        return here

    def total(self) -> int | None:
        """The approximate number of rows, for the progress bar; None if unknown."""
        return None

    def export(self, folder: Path, final: Path, samples: Iterator[Sample]) -> None:
        """Write further files of this source into the prepared `folder`, which is then moved to `final`."""

    # -- for prepare --

    @property
    def downloader(self) -> Download | None:
        assert self.download is None or isinstance(self.download, Download)  # __post_init__ built it from its keys
        return self.download

    def limited_rows(self) -> Iterator[Row | BadRow]:
        """The rows up to `limit`."""
        return islice(self.read(), self.limit)

    def settings(self) -> Settings:
        """All keys as JSON values, for the manifest and the key of the prepared set."""
        keys = dataclasses.asdict(self)
        del keys["too_long"], keys["weight"], keys["loss_weight"]  # they do not change the prepared set
        if not keys["splits"]["near"]:
            del keys["splits"]["near"]
        keys["without"] = sorted(read_ids(self.without)) if self.without is not None else None
        columns = keys.get("columns") or {}
        for name, section in (("download", keys), ("choices", keys), ("without", keys), *((column, columns) for column in ("choices", "index", "rejected", "weight"))):
            if section.get(name) is None:
                section.pop(name, None)  # sets prepared before this key existed keep their key
        for key, default in (("boxes", "xyxy"), ("boxes_unit", "pixels"), ("near_distance", type(self).near_distance)):
            if keys[key] == default:
                del keys[key]
        return {"class": f"{type(self).__module__}.{type(self).__qualname__}", **keys}


@dataclass(kw_only=True)
class FileKeys(BaseSource):
    """The keys of sources that read files of rows; see ReadOptions."""

    format: str | None = None
    encoding: str | None = None
    rows: str | None = None
    quotes: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.options()

    def options(self) -> ReadOptions:
        """Raises UserError for a value that does not exist."""
        return ReadOptions(self.format, self.encoding, self.rows, self.quotes)

    def convert_file(self, file: Path, check: Callable[[dict[str, Any], str], None],
                     convert: Callable[[dict[str, Any], str], Iterable[Row | BadRow]]) -> Iterator[Row | BadRow]:
        """The rows of a file of records, in its order. A record that cannot be read is a BadRow.

        Both functions take a record and its place in the file. check: raises UserError if a column is missing, which a first record may lack that
        others have (see `ColumnCheck`). convert: returns the rows of a record.
        """
        checked = ColumnCheck(check)
        for record in files.read(file, self.options(), self.notes.append):
            if isinstance(record, BadRow):
                yield record
                continue
            where, values = record
            checked(values, where)
            yield from convert(values, where)
        checked.end()


class ColumnCheck:
    """Whether the columns that a source names are there: in JSON Lines and in shards a record may lack what others have, so a column is missing only if none of the first
    100 records has it. check: as in `BaseSource.convert_file`.
    """

    MOST = 100

    def __init__(self, check: Callable[[dict[str, Any], str], None]):
        self.check = check
        self._names: dict[str, Any] = {}
        self._seen = 0
        self._where = ""  # the first record
        self._error: UserError | None = None
        self._done = False

    def __call__(self, values: Mapping[str, Any], where: str) -> None:
        """A further record. Raises UserError at the last of the records that are looked at."""
        if self._done:
            return
        self._names = {**self._names, **values} if self._names else dict(values)
        self._seen += 1
        try:
            self.check(self._names, self._where or where)
        except UserError as error:
            self._error = error
            self._where = self._where or where
            if self._seen >= self.MOST:
                self.end()
        else:
            self._done = True

    def end(self) -> None:
        """Raises UserError if a column was in no record."""
        if not self._done and self._error:
            raise self._error


def from_keys(cls: type[T], values: Mapping[str, Any] | None, where: str) -> T:
    """A dataclass built from a mapping of a config. Raises UserError for a key that the class does not have."""
    names = [f.name for f in dataclasses.fields(cls)]
    for key in values or {}:
        if key not in names:
            raise UserError(f"{where}.{key}: no such key.{nearest(str(key), names)} There are: {', '.join(names)}.")
    return cls(**(values or {}))


def file_stamp(path: Path) -> FileStamp:
    """Path, size and modification time of a file. Raises UserError if it cannot be read."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    return {"path": path.resolve().as_posix(), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
