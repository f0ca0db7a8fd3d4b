"""OpenAIMessages: JSON or JSONL rows with `messages` whose content is text or a list of parts (text, image, image_url)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError, nearest
from ..sample import BadRow, Row
from . import readers
from .base import BaseSource, Stamp, file_stamp
from .turns import conversation_row


@dataclass(kw_only=True)
class OpenAIMessages(BaseSource):
    """path: a JSON or JSONL file. Images are files below `root` (or below the folder of the file) or data: URIs; rows with URLs are dropped.

    `<image>` in a text, or a part {"type": "image"} without a name, stands for the next entry of the row's `images`.
    """

    path: str

    def data_root(self) -> Path:
        return readers.existing(self.root, "data.root", folder=True) if self.root else readers.existing(self.path, folder=False).parent

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(readers.existing(self.path, folder=False))], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return readers.count([Path(self.path)])

    def rows(self) -> Iterator[Row | BadRow]:
        first = True
        for record in readers.read(readers.existing(self.path, folder=False)):
            if isinstance(record, BadRow):
                yield record
                continue
            where, values = record
            if first and "messages" not in values:
                raise UserError(f"{where}: has no 'messages'.{nearest('messages', values)} It has: {', '.join(values)}.")
            first = False
            name = values.get("id")
            yield conversation_row(values, values.get("messages"), values.get("images"), where,
                                   id=None if name is None else str(name), split=values.get("split"))
