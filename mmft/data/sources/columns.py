"""Columns: which columns hold image, text and prompt; converts a record of a table to a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...common.errors import UserError, nearest
from ..sample import BadRow, Message, Row, assistant_turn, text_part, user_turn
from .turns import PLACEHOLDER, TurnError, conversation_row, image_cells, read_turns


@dataclass(frozen=True)
class Columns:
    """Names of columns; null for a column that the table does not have.

    image: a path, the bytes of a file, or a list of these. text: the caption or answer, or a list (the first one is
    trained, all are references). prompt: the user's text. references: all known answers. messages: a conversation
    instead of prompt and text.
    """

    image: str | None = "image"
    text: str | None = "text"
    prompt: str | None = None
    system: str | None = None
    references: str | None = None
    id: str | None = None
    split: str | None = None
    messages: str | None = None

    def check(self, available: Iterable[str], where: str) -> None:
        """Raises UserError naming the key whose column does not exist, and the nearest existing one."""
        names = list(available)
        for f in fields(self):
            column = getattr(self, f.name)
            if column is None or column in names or (f.name == "text" and self.messages):
                continue
            raise UserError(f"data.columns.{f.name}={column}: {where} has no such column.{nearest(column, names)} "
                            f"It has: {', '.join(names)}.")

    def row(self, record: Mapping[str, Any], where: str, prompt: str | None = None, position: str = "kept") -> Row | BadRow:
        """One record as a row. prompt: the user's text for rows without a prompt column."""
        name = record.get(self.id) if self.id else None
        split = record.get(self.split) if self.split else None
        common: dict[str, Any] = {"id": None if name is None else str(name), "split": str(split).strip() or None if split is not None else None}
        images = record.get(self.image) if self.image else None
        if self.messages:
            return conversation_row(record, record.get(self.messages), images, where, position=position, **common)
        try:
            cells = image_cells(images)
            answers = texts(record.get(self.text) if self.text else None)
            question = next(iter(texts(record.get(self.prompt))), None) if self.prompt else None
            messages: list[Message] = [user_turn(len(cells), question or prompt)]
            if question and PLACEHOLDER in question and cells:  # in a row without images it is plain text
                messages, cells = read_turns([{"role": "user", "content": question}], cells, position=position)
        except TurnError as error:
            return BadRow(where, str(error), common["id"])
        if not answers:
            return BadRow(where, f"empty answer: column {self.text} is empty", common["id"])
        if self.system and (system := next(iter(texts(record.get(self.system))), None)):
            messages.insert(0, {"role": "system", "content": [text_part(system)]})
        references = answers + (texts(record.get(self.references)) if self.references else [])
        return Row(cells, [*messages, assistant_turn(answers[0])], list(dict.fromkeys(references)), where=where, **common)


def texts(value: Any) -> list[str]:
    """The non-empty texts of a cell: a string, a number, a list of these, or COCO's {"raw": text}."""
    if value is None or isinstance(value, float) and value != value:
        return []
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("raw", "caption", "text", "answer") if isinstance(value.get(k), str)), "")
    text = str(value).strip()
    return [text] if text else []
