"""Columns: which column of a table is the image, the text, the prompt; a record to a row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...common.errors import UserError, nearest
from ..sample import IMAGE, Bad, Row, assistant_turn, text_part, user_turn
from .turns import TurnError, conversation_row, image_cells, read_turns


@dataclass(frozen=True)
class Columns:
    """Names of columns; null for what a table does not have.

    image: a path, the bytes of a file, or a list of these. text: the caption or answer, or a list of them (the first
    is trained on, all are references). prompt: the user's words. references: all answers known. messages: a
    conversation instead of prompt and text.
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
        """Errors raised: UserError naming the key whose column is not there, and the nearest one that is."""
        names = list(available)
        for f in fields(self):
            column = getattr(self, f.name)
            if column is None or column in names or (f.name == "text" and self.messages):
                continue
            raise UserError(f"data.columns.{f.name}={column}: {where} has no such column.{nearest(column, names)} "
                            f"It has: {', '.join(names)}.")

    def row(self, record: Mapping[str, Any], where: str, prompt: str | None = None, position: str = "kept") -> Row | Bad:
        """One record as a row. prompt: the user's words for every row, where there is no prompt column."""
        name = record.get(self.id) if self.id else None
        split = record.get(self.split) if self.split else None
        common: dict[str, Any] = {"id": None if name is None else str(name), "split": str(split).strip() or None if split is not None else None}
        images = record.get(self.image) if self.image else None
        if self.messages:
            return conversation_row(record, record.get(self.messages), images, where, position=position, **common)
        try:
            cells = image_cells(images)
            answers = texts(record.get(self.text) if self.text else None)
            words = next(iter(texts(record.get(self.prompt))), None) if self.prompt else None
            if words and "<image>" in words:
                messages, cells = read_turns([{"role": "user", "content": words}], cells, position=position)
                if not cells:  # the words are plain text in a row without images
                    messages = [user_turn(0, words)]
            else:
                messages = [{"role": "user", "content": [dict(IMAGE) for _ in cells] + ([text_part(w)] if (w := words or prompt) else [])}]
        except TurnError as error:
            return Bad(where, str(error), common["id"])
        if not answers:
            return Bad(where, f"empty answer: column {self.text} is empty", common["id"])
        if self.system and (system := next(iter(texts(record.get(self.system))), None)):
            messages.insert(0, {"role": "system", "content": [text_part(system)]})
        references = answers + (texts(record.get(self.references)) if self.references else [])
        return Row(cells, [*messages, assistant_turn(answers[0])], list(dict.fromkeys(references)), where=where, **common)


def texts(value: Any) -> list[str]:
    """The texts a cell holds, empty ones left out: a string, a number, a list of these, or COCO's {"raw": text}."""
    if value is None or isinstance(value, float) and value != value:
        return []
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in texts(item)]
    if isinstance(value, Mapping):
        value = next((value[k] for k in ("raw", "caption", "text", "answer") if isinstance(value.get(k), str)), "")
    text = str(value).strip()
    return [text] if text else []
