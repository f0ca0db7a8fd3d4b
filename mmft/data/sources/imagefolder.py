"""ImageFolder: a folder of images with metadata.jsonl or metadata.csv (file_name and text), optionally one for each split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import UserError
from ..sample import BadRow, Row
from ..splits import ALIASES
from . import readers
from .base import BaseSource, Stamp, file_stamp, from_keys
from .columns import Columns

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(kw_only=True)
class ImageFolder(BaseSource):
    """path: the folder. The metadata file lies in it, or in its subfolders train, validation and test, which then are the splits.

    columns.image is `file_name`, relative to the metadata file (`file_names` for several images a row).
    """

    path: str
    columns: Columns = field(default_factory=lambda: Columns(image="file_name"))
    prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.columns, Columns):
            self.columns = from_keys(Columns, {"image": "file_name", **self.columns}, "data.columns")

    def files(self) -> list[Path]:
        folder = readers.existing(self.path, folder=True)
        found = [folder / name for name in METADATA if (folder / name).is_file()][:1]
        for part in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.lower() in ALIASES):
            found += [part / name for name in METADATA if (part / name).is_file()][:1]
        if not found:
            raise UserError(f"data.path={self.path}: holds no metadata.jsonl or metadata.csv (file_name and text, a line an image)")
        return found

    def data_root(self) -> Path:
        return Path(self.root or self.path)

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(f) for f in self.files()]}

    def total(self) -> int | None:
        return readers.count(self.files())

    def rows(self) -> Iterator[Row | BadRow]:
        folder = readers.existing(self.path, folder=True)
        for file in self.files():
            inner = "" if file.parent == folder else file.parent.name + "/"
            checked = False
            for record in readers.read(file):
                if isinstance(record, BadRow):
                    yield record
                    continue
                where, values = record
                if not checked:
                    self.columns.check(values, inner + file.name)
                    checked = True
                row = self.columns.row(values, inner + where, self.prompt)
                if isinstance(row, Row) and inner:
                    row.images = [inner + image if isinstance(image, str) and image else image for image in row.images]
                    row.split = row.split or file.parent.name
                yield row
