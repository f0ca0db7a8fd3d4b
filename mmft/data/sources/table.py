"""Table: rows of CSV, TSV, JSON, JSONL, parquet or Arrow files, read by column names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..readers import files
from ..sample import BadRow, Row
from .base import FileKeys, Stamp, file_stamp
from .columns import ColumnKeys, PositionKey


@dataclass(kw_only=True)
class Table(FileKeys, ColumnKeys, PositionKey):
    """path: a file, a folder of files, or a pattern (`shards/*.parquet`).

    Image paths are relative to `root`, or to the folder of the (first) file.
    """

    path: str

    def files(self) -> list[Path]:
        return files.find_files(self.path)

    def data_root(self) -> Path:
        return Path(self.root).expanduser() if self.root else self.files()[0].parent

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(f) for f in self.files()], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return files.count(self.files(), self.options())

    def read(self) -> Iterator[Row | BadRow]:
        if self.root:
            files.existing(self.root, "data.root", folder=True)
        for file in self.files():
            yield from self.convert_file(file, partial(self._check, file.name), self._convert)

    def _check(self, name: str, values: dict[str, Any], where: str) -> None:
        self.columns.check(values, name)

    def _convert(self, values: dict[str, Any], where: str) -> Iterator[Row | BadRow]:
        return self.columns.rows(values, where, self.prompt, self.image_position, self.captions, self.boxes)
