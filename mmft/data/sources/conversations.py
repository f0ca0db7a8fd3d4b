"""Conversations: LLaVA's chat.json beside a folder of images, also in Qwen's form with image paths in the text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError, nearest
from ..sample import BadRow, Row
from . import readers
from .base import BaseSource, Stamp, file_stamp
from .turns import POSITIONS, conversation_row


@dataclass(kw_only=True)
class Conversations(BaseSource):
    """Rows {id, image | images, conversations: [{from | role, value | content}]} of a JSON or JSONL file.

    path: the file, or a folder with `file` and optionally the folder `images`. Image paths are relative to `root`, or to
    the folder of the images. image_position: see turns.read_turns.
    """

    path: str
    file: str = "chat.json"
    images: str | None = None
    turns_key: str = "conversations"
    image_position: str = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_position not in POSITIONS:
            raise UserError(f"data.image_position={self.image_position}: must be {', '.join(POSITIONS)}")

    def json_file(self) -> Path:
        place = readers.existing(self.path)
        return readers.existing(place / self.file, folder=False) if place.is_dir() else place

    def data_root(self) -> Path:
        if self.root:
            return readers.existing(self.root, "data.root", folder=True)
        folder = self.json_file().parent
        return readers.existing(folder / self.images, "data.images", folder=True) if self.images else folder

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(self.json_file())], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return readers.count([self.json_file()])

    def rows(self) -> Iterator[Row | BadRow]:
        first = True
        for record in readers.read(self.json_file()):
            if isinstance(record, BadRow):
                yield record
                continue
            where, values = record
            if first and self.turns_key not in values:
                raise UserError(f"{where}: has no {self.turns_key!r}.{nearest(self.turns_key, values)} It has: {', '.join(values)}.")
            first = False
            images = values.get("images") if values.get("image") is None else values["image"]
            name = values.get("id")
            yield conversation_row(values, values.get(self.turns_key), images, where, id=None if name is None else str(name),
                                   split=values.get("split"), position=self.image_position)
