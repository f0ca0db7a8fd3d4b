"""Table: rows of CSV, TSV, JSON, JSONL, parquet or Arrow files, read by column names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..readers import files
from ..sample import BadRow, Row
from .base import BaseSource, FileKeys, Stamp, file_stamp, from_keys
from .columns import ColumnKeys, Columns, check_choices


@dataclass(kw_only=True)
class Table(FileKeys, ColumnKeys, BaseSource):
    """path: a file, a folder of files, or a pattern (`shards/*.parquet`). image_position: of images in conversations, see read_turns.

    Image paths are relative to `root`, or to the folder of the (first) file.
    """

    path: str
    image_position: str = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.columns, Columns):
            self.columns = from_keys(Columns, self.columns, "data.columns")
        check_choices(self.captions, self.image_position)
        self.options()

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
            checked = False
            for record in files.read(file, self.options(), self.notes.append):
                if isinstance(record, BadRow):
                    yield record
                    continue
                where, values = record
                if not checked:
                    self.columns.check(values, file.name)
                    checked = True
                yield from self.columns.rows(values, where, self.prompt, self.image_position, self.captions)
