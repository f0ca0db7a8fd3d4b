"""ImageFolder: a folder of images with metadata.jsonl or metadata.csv (file_name and text), optionally one for each split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from ...common.errors import UserError
from ..readers import files
from ..sample import BadRow, Row
from ..splits import ALIASES
from .base import FileKeys, Stamp, file_stamp
from .columns import ColumnKeys, Columns

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json", "metadata.tsv")


@dataclass(kw_only=True)
class ImageFolder(FileKeys, ColumnKeys):
    """path: the folder. The metadata file lies in it, or in its subfolders train, validation and test, which then are the splits.

    columns.image is `file_name`, relative to the metadata file (`file_names` for several images a row).
    """

    path: str
    columns: Columns = field(default_factory=lambda: Columns(image="file_name"))
    default_columns: ClassVar[Mapping[str, str]] = {"image": "file_name"}

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
            part = "" if file.parent == folder else file.parent.name
            yield from self.convert_file(file, partial(self._check, file.relative_to(folder).as_posix()), partial(self._convert, part))

    def _check(self, name: str, values: dict[str, Any], where: str) -> None:
        self.columns.check(values, name)

    def _convert(self, part: str, values: dict[str, Any], where: str) -> Iterator[Row | BadRow]:
        """part: the subfolder of the metadata file, which names the split; "" for the folder itself."""
        inner = f"{part}/" if part else ""
        for row in self.columns.rows(values, inner + where, self.prompt, captions=self.captions, boxes=self.boxes):
            if isinstance(row, Row) and part:
                row.images = [inner + image if isinstance(image, str) and image else image for image in row.images]
                row.split = row.split or part
            yield row
