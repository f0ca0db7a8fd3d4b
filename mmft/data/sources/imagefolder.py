"""ImageFolder: a folder of images with metadata.jsonl or metadata.csv (file_name and text), optionally one for each split."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import UserError
from ..readers import files
from ..sample import BadRow, Row
from ..splits import ALIASES
from .base import BaseSource, FileKeys, Stamp, file_stamp, from_keys
from .columns import ColumnKeys, Columns, check_choices

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json", "metadata.tsv")


@dataclass(kw_only=True)
class ImageFolder(FileKeys, ColumnKeys, BaseSource):
    """path: the folder. The metadata file lies in it, or in its subfolders train, validation and test, which then are the splits.

    columns.image is `file_name`, relative to the metadata file (`file_names` for several images a row).
    """

    path: str
    columns: Columns = field(default_factory=lambda: Columns(image="file_name"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.columns, Columns):
            self.columns = from_keys(Columns, {"image": "file_name", **self.columns}, "data.columns")
        check_choices(self.captions)
        self.options()

    def files(self) -> list[Path]:
        folder = files.existing(self.path, folder=True)
        metadata = [folder / name for name in METADATA if (folder / name).is_file()][:1]
        for part in sorted(p for p in folder.iterdir() if p.is_dir() and p.name.lower() in ALIASES):
            metadata += [part / name for name in METADATA if (part / name).is_file()][:1]
        if not metadata:
            raise UserError(f"data.path={self.path}: holds no metadata.jsonl or metadata.csv (file_name and text, a line an image);"
                            " folders of classes are read with data=classfolder, other tables with data=table")
        return metadata

    def data_root(self) -> Path:
        return Path(self.root or self.path).expanduser()

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(f) for f in self.files()]}

    def total(self) -> int | None:
        return files.count(self.files(), self.options())

    def read(self) -> Iterator[Row | BadRow]:
        folder = files.existing(self.path, folder=True)
        for file in self.files():
            inner = "" if file.parent == folder else file.parent.name + "/"
            checked = False
            for record in files.read(file, self.options(), self.notes.append):
                if isinstance(record, BadRow):
                    yield record
                    continue
                where, values = record
                if not checked:
                    self.columns.check(values, inner + file.name)
                    checked = True
                for row in self.columns.rows(values, inner + where, self.prompt, captions=self.captions):
                    if isinstance(row, Row) and inner:
                        row.images = [inner + image if isinstance(image, str) and image else image for image in row.images]
                        row.split = row.split or file.parent.name
                    yield row
