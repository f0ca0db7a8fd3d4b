"""OpenAIMessages: JSON or JSONL rows with `messages` whose content is text or a list of parts (text, image, image_url)."""

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

_ANSWERS = {"completion", "chosen"}  # keys of TRL's format


@dataclass(kw_only=True)
class OpenAIMessages(FileKeys, PositionKey):
    """path: a JSON or JSONL file. Images are files below `root` (or below the folder of the file) or data: URIs; rows with URLs are dropped.
    Rows of TRL's format have `prompt` and `completion` instead of `messages`, or `prompt`, `chosen` and `rejected`. ms-swift's
    `rejected_response` is read, too, and `label` (true or false).

    `<image>` in a text, or a part {"type": "image"} without a name, stands for the next entry of the row's `images`.
    """

    path: str

    def data_root(self) -> Path:
        return files.existing(self.root, "data.root", folder=True) if self.root else files.existing(self.path, folder=False).parent

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(files.existing(self.path, folder=False))], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return files.count([files.existing(self.path, folder=False)], self.options())

    def read(self) -> Iterator[Row | BadRow]:
        return self.convert_file(files.existing(self.path, folder=False), self._check, self._convert)

    def _check(self, values: dict[str, Any], where: str) -> None:
        if "messages" not in values and not _ANSWERS.intersection(values):
            other = next((f"; rows with {k} are read with data=conversations data.turns_key={k}" for k in ("conversations", "conversation") if k in values), "")
            raise UserError(f"{where}: has no 'messages', and no 'prompt' with 'completion' or 'chosen'{other}.{'' if other else nearest('messages', values)} It has: {listed(values)}.")

    def _convert(self, values: dict[str, Any], where: str) -> Iterator[Row | BadRow]:
        turns = values["messages"] if "messages" in values else _turns(values.get("prompt"), values.get("chosen", values.get("completion")))
        yield record_row(values, turns, where, self.image_position, self.boxes)


def _turns(prompt: Any, completion: Any) -> list[Any]:
    """The turns of TRL's format: prompt and completion are lists of messages, or texts. Without a prompt, the completion holds it, too."""
    turns: list[Any] = []
    for role, part in (("user", prompt), ("assistant", completion)):
        turns += part if isinstance(part, list) else [] if part is None and role == "user" and isinstance(completion, list) else [{"role": role, "content": part}]
    return turns
