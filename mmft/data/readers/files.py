"""Find the files of a data set and read their rows, whatever their format."""

from __future__ import annotations

import csv
import glob
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError, nearest
from ..archives import SUFFIXES as ARCHIVES
from ..images import is_image
from ..sample import BadRow
from .arrow_files import read_arrow, read_parquet
from .delimited import Record, read_delimited
from .json_files import json_array, read_json
from .text import check_encoding, open_text, unreadable_text

SUFFIXES = {
    ".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow",
}  # fmt: skip
FORMATS = ("csv", "tsv", "json", "jsonl", "parquet", "arrow")
QUOTES = ("auto", "quoting", "text")
_PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class ReadOptions:
    """How files of rows are read: the keys data.format, data.encoding, data.rows and data.quotes; null: detected.

    rows: the key of a JSON object under which its rows stand. quotes: of CSV and TSV files, see read_delimited.
    """

    format: str | None = None
    encoding: str | None = None
    rows: str | None = None
    quotes: str = "auto"

    def __post_init__(self) -> None:
        if self.format is not None and self.format not in FORMATS:
            raise UserError(f"data.format={self.format}: must be {', '.join(FORMATS)}, or null to detect it.{nearest(str(self.format), FORMATS)}")
        if self.quotes not in QUOTES:
            raise UserError(f"data.quotes={self.quotes}: must be {', '.join(QUOTES)}.{nearest(str(self.quotes), QUOTES)}")
        check_encoding(self.encoding)


def existing(path: str | Path, key: str = "data.path", folder: bool | None = None) -> Path:
    """`path` if it exists (and, if `folder` is given, is a folder or a file). Raises UserError with the nearest name."""
    place = Path(path).expanduser()
    try:
        exists = {True: place.is_dir, False: place.is_file, None: place.exists}[folder]()
    except (OSError, ValueError):
        exists = False
    if exists:
        return place
    if folder and place.suffix.lower() in ARCHIVES and place.is_file():
        raise UserError(f"{key}={path}: is an archive; name the folder that holds it ({key}={place.parent}), images are read from archives in it")
    kind = {True: "folder", False: "file", None: "file or folder"}[folder]
    parent = place.parent
    while not parent.is_dir() and parent != parent.parent:
        place, parent = parent, parent.parent
    try:
        names = sorted(p.name for p in parent.iterdir())
    except OSError:
        names = []
    hint = nearest(place.name, names)
    raise UserError(f"{key}={path}: no such {kind} ({parent} has no {place.name}).{hint}" if not place.exists()
                    else f"{key}={path}: is not a {kind}")


def find_files(path: str) -> list[Path]:
    """The table files that `path` names: a file, a folder of files of one format, or a pattern. Raises UserError if there are none."""
    if any(c in path for c in "*?[") and not Path(path).expanduser().exists():
        matching = sorted(Path(p) for p in glob.glob(str(Path(path).expanduser()), recursive=True) if Path(p).is_file())
        if not matching:
            raise UserError(f"data.path={path}: no file matches")
        return matching
    place = existing(path)
    if place.is_file():
        return [place]
    files = sorted(p for p in place.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"data.path={path}: the folder holds no {', '.join(SUFFIXES)} file; name the file")
    if len({SUFFIXES[p.suffix.lower()] for p in files}) > 1:
        raise UserError(f"data.path={path}: holds files of several kinds ({', '.join(p.name for p in files[:4])}); name one")
    return files


def detect_format(path: Path, options: ReadOptions) -> str:
    """data.format, the format that the suffix names, or the one that the content shows. Raises UserError for any other file."""
    if options.format is not None:
        return options.format
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    with path.open("rb") as file:
        head = file.read(16)
    packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
    if packed:
        raise UserError(f"{path}: is compressed with {packed}; unpack it first, and name the unpacked file")
    if head.startswith(b"PK"):
        raise UserError(f"{path}: is an archive or an Excel file; unpack it, or save the sheet as CSV, and name that file")
    if head.startswith(b"PAR1"):
        return "parquet"
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return "arrow"
    line = ""
    if not is_image(head):
        with open_text(path, options.encoding) as text:
            line = next((x for x in text if x.strip()), "")
    if line.lstrip("\ufeff \t")[:1] in ("{", "["):
        return "json"
    if "\t" in line:
        return "tsv"
    if any(d in line for d in ",;|"):
        return "csv"
    raise UserError(f"{path}: neither its name nor its content shows a format; name it with data.format={'|'.join(FORMATS)}")


def read(path: Path, options: ReadOptions | None = None, note: Callable[[str], None] = lambda text: None) -> Iterator[Record | BadRow]:
    """The rows of one file. note: receives lines for the user. Raises UserError for a file that cannot be parsed at all."""
    options = options or ReadOptions()
    try:
        kind = detect_format(path, options)
        if kind == "parquet":
            yield from read_parquet(path)
        elif kind == "arrow":
            yield from read_arrow(path)
        elif kind in ("json", "jsonl"):
            yield from read_json(path, options.encoding, options.rows, note)
        else:
            yield from read_delimited(path, options.encoding, options.quotes, kind == "tsv", note)
    except UnicodeError:
        raise unreadable_text(path, options.encoding) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error.strerror or error).split())}") from None
    except csv.Error as error:
        raise UserError(f"{path}: is not a table of separated values: {error}") from None


def count(files: list[Path], options: ReadOptions | None = None) -> int | None:
    """The approximate number of rows: exact for parquet and JSONL, estimated from the first rows for JSON arrays."""
    totals = [_count(f, options or ReadOptions()) for f in files]
    known = [n for n in totals if n is not None]
    return sum(known) if len(known) == len(totals) else None


def _count(path: Path, options: ReadOptions) -> int | None:
    try:
        kind = detect_format(path, options)
        if kind == "parquet":
            import pyarrow.parquet as pq

            return pq.read_metadata(path).num_rows
        if kind in ("csv", "tsv", "jsonl"):
            with path.open("rb") as file:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        if kind == "json":
            read_so_far: tuple[int, int] | None = None
            for n, (_, characters) in enumerate(json_array(path, None, options.encoding), 1):
                read_so_far = n, characters
                if n == 200:
                    break
            return None if not read_so_far else max(read_so_far[0], read_so_far[0] * path.stat().st_size // max(1, read_so_far[1]))
    except Exception:  # the count only serves the progress bar; the reader reports what is wrong with the file
        pass
    return None
