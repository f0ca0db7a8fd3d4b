"""Conversations: LLaVA's chat.json beside a folder of images, also in Qwen's form with image paths in the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import UserError, nearest
from ..readers import files
from ..sample import BadRow, Row
from ..wording import listed
from .base import FileKeys, Stamp, file_stamp
from .columns import PositionKey
from .turns import record_row


@dataclass(kw_only=True)
class Conversations(FileKeys, PositionKey):
    """Rows {id, image | images, conversations: [{from | role, value | content}]} of a JSON or JSONL file.

    path: the file, or a folder with `file` and optionally the folder `images`. Image paths are relative to `root`, or to
    the folder of the images.
    """

    path: str
    file: str = "chat.json"
    images: str | None = None
    turns_key: str = "conversations"

    def json_file(self) -> Path:
        place = files.existing(self.path)
        return files.existing(place / self.file, folder=False) if place.is_dir() else place

    def data_root(self) -> Path:
        if self.root:
            return files.existing(self.root, "data.root", folder=True)
        folder = self.json_file().parent
        return files.existing(folder / self.images, "data.images", folder=True) if self.images else folder

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(self.json_file())], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return files.count([self.json_file()], self.options())

    def read(self) -> Iterator[Row | BadRow]:
        return self.convert_file(self.json_file(), self._check, self._convert)

    def _check(self, values: dict[str, Any], where: str) -> None:
        if self.turns_key not in values:
            raise UserError(f"{where}: has no {self.turns_key!r}.{nearest(self.turns_key, values)} It has: {listed(values)}.")

    def _convert(self, values: dict[str, Any], where: str) -> Iterator[Row | BadRow]:
        yield record_row(values, values.get(self.turns_key), where, self.image_position, self.boxes)
