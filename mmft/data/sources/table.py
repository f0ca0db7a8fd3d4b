"""Table: rows of CSV, TSV, JSON, JSONL, parquet or Arrow files, read by column names."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import UserError
from ..sample import BadRow, Row
from . import readers
from .base import BaseSource, Stamp, file_stamp, from_keys
from .columns import Columns


@dataclass(kw_only=True)
class Table(BaseSource):
    """path: a file, a folder of files, or a pattern (`shards/*.parquet`). prompt: the user's text for rows without a prompt column.

    Image paths are relative to `root`, or to the folder of the (first) file.
    """

    path: str
    columns: Columns = field(default_factory=Columns)
    prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.columns, Columns):
            self.columns = from_keys(Columns, self.columns, "data.columns")

    def files(self) -> list[Path]:
        return find_files(self.path)

    def data_root(self) -> Path:
        return Path(self.root) if self.root else self.files()[0].parent

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(f) for f in self.files()], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return readers.count(self.files())

    def rows(self) -> Iterator[Row | BadRow]:
        if self.root:
            readers.existing(self.root, "data.root", folder=True)
        for file in self.files():
            checked = False
            for record in readers.read(file):
                if isinstance(record, BadRow):
                    yield record
                    continue
                where, values = record
                if not checked:
                    self.columns.check(values, file.name)
                    checked = True
                yield self.columns.row(values, where, self.prompt)


def find_files(path: str) -> list[Path]:
    """The table files that `path` names. Raises UserError if there are none, or files of several formats."""
    if any(c in path for c in "*?[") and not Path(path).exists():
        found = sorted(Path(p) for p in glob.glob(path, recursive=True))
        if not found:
            raise UserError(f"data.path={path}: no file matches")
        return found
    place = readers.existing(path)
    if place.is_file():
        return [place]
    found = sorted(p for p in place.iterdir() if p.suffix.lower() in readers.SUFFIXES)
    if not found:
        raise UserError(f"data.path={path}: the folder holds no {', '.join(readers.SUFFIXES)} file")
    if len({p.suffix.lower() for p in found}) > 1:
        raise UserError(f"data.path={path}: holds files of several kinds ({', '.join(p.name for p in found[:4])}); name one")
    return found
