"""Columns: which columns hold image, text and prompt; converts a record of a table to rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, ClassVar, TypedDict

from ...common.errors import UserError, nearest
from ..sample import BadRow, Message, PlainRow, Row, assistant_turn, text_part
from ..wording import listed, shown
from .base import BaseSource, from_keys
from .cells import LIST_NOTE, MAY_BE_LIST, PLAIN_PATH, UnusableRow, image_cells, structure_in_text, texts
from .objects import place_objects, read_objects
from .preferences import good_or_bad, pair_in, rejected_answer
from .turns import PLACEHOLDER, POSITIONS, conversation_row, prompt_turn, weigh

CAPTIONS = ("first", "common", "all", "group")


class _Common(TypedDict):
    id: str | None
    split: str | None


@dataclass(frozen=True)
class Columns:
    """Names of columns; null for a column that the table does not have.

    image: a path, the bytes of a file, or a list of these. text: the caption or answer, or a list of them. prompt: the user's
    text. references: all known answers. messages: a conversation instead of prompt and text. objects: boxes and points (objects.py).
    label: the text for `<ref-object>` and the label of boxes that have none, or a list of such texts; or, without objects, true or
    false: whether the answer is a good one. choices: a list of the texts of which the answer is one. index: the number of the right one
    among them, from 0, in place of text. rejected: a worse answer than text. weight: of the row's loss.

    text may be a list of columns, each with a caption. A name with dots, `ground_truth.gt_parse`, is a key inside a cell that is an
    object, or the JSON text of one; an object found there becomes the answer as JSON.
    """

    image: str | None = "image"
    text: str | Sequence[str] | None = "text"
    prompt: str | None = None
    system: str | None = None
    references: str | None = None
    id: str | None = None
    split: str | None = None
    messages: str | None = None
    objects: str | None = None
    label: str | None = None
    choices: str | None = None
    index: str | None = None
    rejected: str | None = None
    weight: str | None = None

    def check(self, available: Iterable[str], where: str) -> None:
        """Raises UserError naming the key whose column does not exist, and the nearest existing one."""
        names = list(available)
        for key, column in self._columns():
            if column in names or column.split(".")[0] in names or (key == "text" and (self.messages or self.objects or self.index)):
                continue
            raise UserError(f"data.columns.{key}={column}: {where} has no such column.{nearest(column, names)} "
                            f"It has: {listed(names)}.")

    def _columns(self) -> Iterator[tuple[str, str]]:
        """(key, name of a column) of all columns."""
        for f in fields(self):
            column = getattr(self, f.name)
            yield from ((f.name, str(one)) for one in ([] if column is None else [column] if isinstance(column, str) else column))

    def row(self, record: Mapping[str, Any], where: str, prompt: str | None = None, position: str = "kept") -> Row | BadRow:
        """One record as a row, trained on the first of its texts. prompt: the user's text for rows without a prompt column."""
        return next(self.rows(record, where, prompt, position))

    def rows(self, record: Mapping[str, Any], where: str, prompt: str | None = None, position: str = "kept",
             captions: str = "first", boxes: str = "xyxy") -> Iterator[Row | BadRow]:
        """One record as a row, or with captions=`all` as one row for each of its texts. In both cases all texts are references.

        boxes: the form of the numbers of a box (objects.FORMS).
        """
        if self._plain and (plain := self._plain_row(record, where, prompt)) is not None:
            yield plain
            return
        pair = pair_in(_cell(record, self.text)) if isinstance(self.text, str) and not self.rejected else None
        if pair is not None:  # RLHF-V: question and answers in one cell
            own = replace(self, text="chosen", rejected="rejected", prompt=self.prompt or ("question" if "question" in pair else None))
            yield from own.rows({**record, **pair}, where, prompt, position, captions, boxes)
            return
        for row in self._rows(record, where, prompt, position, captions, boxes):
            if isinstance(row, Row):
                try:
                    self._add_choices(row, record)
                except UnusableRow as error:
                    row = BadRow(where, str(error), row.id)
            yield weigh(row, _cell(record, self.weight)) if self.weight else row

    @cached_property
    def _plain(self) -> bool:
        """Whether a row is one image, a text, and perhaps a prompt, an id and a split."""
        names = (self.image, self.text, self.prompt, self.id, self.split)
        others = (self.system, self.references, self.messages, self.objects, self.label, self.choices, self.index, self.rejected, self.weight)
        return self.image is not None and self.text is not None and all(n is None or isinstance(n, str) and "." not in n for n in names) and not any(others)

    def _plain_row(self, record: Mapping[str, Any], where: str, prompt: str | None) -> Row | None:
        """What `_rows` returns for a path and a caption, in a fifth of its time; None for other cells."""
        image, answer = record.get(str(self.image)), record.get(str(self.text))
        question = record.get(self.prompt) if self.prompt is not None else None
        if type(image) is not str or type(answer) is not str or not PLAIN_PATH(image) or question is not None and type(question) is not str:
            return None
        answer, words = answer.strip(), question.strip() if question else ""
        if not answer or answer.startswith(MAY_BE_LIST) or words and words.startswith(MAY_BE_LIST):
            return None
        words = words or prompt or ""
        if PLACEHOLDER in words:
            return None
        name = record.get(self.id) if self.id is not None else None
        split = record.get(self.split) if self.split is not None else None
        return PlainRow(image, words, answer, None if name is None else str(name), None if split is None else str(split).strip() or None, where)

    def _add_choices(self, row: Row, record: Mapping[str, Any]) -> None:
        """The choices, the rejected answer and the label of a row. Raises UnusableRow."""
        if self.choices:
            row.choices = texts(structure_in_text(_cell(record, self.choices)), f"column {self.choices}", optional=True)
        if self.rejected:
            row.rejected = rejected_answer(_cell(record, self.rejected), _text_cell(record, self.text), f"column {self.rejected}")
        if self.label and not self.objects:
            row.label = good_or_bad(_cell(record, self.label))

    def _rows(self, record: Mapping[str, Any], where: str, prompt: str | None, position: str, captions: str, boxes: str) -> Iterator[Row | BadRow]:
        name, split = (_cell(record, column) for column in (self.id, self.split))
        common: _Common = {"id": None if name is None else str(name), "split": str(split).strip() or None if split is not None else None}
        images, objects = (_cell(record, column) for column in (self.image, self.objects))
        cell = _text_cell(record, self.text) if self.index is None else None
        conversation = _cell(record, self.messages) if self.messages else _completion(_cell(record, self.prompt), cell)
        if self.messages or conversation is not None:
            yield conversation_row(conversation, images, where, position=position, objects=objects, boxes=boxes, **common)
            return
        try:
            paths = image_cells(images)
            answers = texts(cell, f"column {self._text_name}") if self.index is None else [self._chosen(record)]
            question = _cell(record, self.prompt)
            if isinstance(question, (list, tuple)) and len(question) > 1:  # VQA: lists of questions and of answers
                if not isinstance(cell, (list, tuple)) or len(cell) != len(question):
                    raise UnusableRow(f"no answer: {len(question)} prompts in column {self.prompt}, {len(answers)} texts in column {self._text_name}")
                yield conversation_row(list(zip(question, cell)), paths, where, position="added", **common)
                return
            words = next(iter(texts(question, f"column {self.prompt}", optional=True)), None)
            messages: list[Message] = [prompt_turn(paths, words or prompt, shared=not words, position=position)]
            system = next(iter(texts(_cell(record, self.system), f"column {self.system}", optional=True)), None) if self.system else None
            label = _cell(record, self.label)
            says_good = not self.objects and good_or_bad(label) is not None
            labels = texts(label, f"column {self.label}", optional=True) if not says_good else []
            found = read_objects(objects, boxes)
            people = texts(_cell(record, self.references), f"column {self.references}", optional=True) if self.references else []
            # an answer that several people gave stays there several times: VQA's accuracy counts them
            references = [*(() if found else (a for a in answers if a not in people)), *people]
        except UnusableRow as error:
            yield BadRow(where, str(error), common["id"])
            return
        if not answers and not found:
            named = " and ".join(name for name in (self._text_name, self.objects) if name and name in record) or self._text_name
            yield BadRow(where, f"empty answer: column {named} is empty", common["id"])
            return
        if system:
            messages.insert(0, {"role": "system", "content": [text_part(system)]})
        notes = (LIST_NOTE,) if isinstance(cell, str) and answers != [cell.strip()] else ()
        # objects without a text: a row for each of their labels (RefCOCO has several phrases for one box)
        if captions == "common" and answers:
            answers = [max(people or answers, key=(people or answers).count)]  # the first one of those given most often
        variants = [(answer, labels) for answer in answers] or [("", [label]) for label in labels] or [("", labels)]
        for number, (answer, names) in enumerate(variants if captions == "all" else variants[:1], 1):
            turns: list[Message] = messages if len(variants) == 1 or captions != "all" else [{"role": m["role"], "content": list(m["content"])} for m in messages]
            name = common["id"] if common["id"] is None or captions != "all" or len(variants) == 1 else f"{common['id']}-{number}"
            turns = [*turns, assistant_turn(answer)] if answer else [*turns]
            try:
                if found:
                    place_objects(turns, found.named(names))
            except UnusableRow as error:
                yield BadRow(where, str(error), name)
                continue
            yield Row(list(paths), turns, _first(answer, references) if answer and not found else list(references), name, common["split"], where,
                      notes if number == 1 else (), found.unit)  # fmt: skip


    @property
    def _text_name(self) -> str:
        return self.text if isinstance(self.text, str) else " and ".join(self.text or ())

    def _chosen(self, record: Mapping[str, Any]) -> str:
        """The choice that the cell `index` names. Raises UnusableRow."""
        options, number = texts(structure_in_text(_cell(record, self.choices)), f"column {self.choices}", optional=True), _cell(record, self.index)
        if isinstance(number, str) and number.strip().isdigit():
            number = int(number)
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(options):
            raise UnusableRow(f"no answer: column {self.index} is {shown(number)}, and column {self.choices} has {len(options)} choices, counted from 0")
        return options[number]


def _first(answer: str, references: Sequence[str]) -> list[str]:
    """The references with the training answer in front."""
    others = list(references)
    if answer in others:
        others.remove(answer)
    return [answer, *others]


def _cell(record: Mapping[str, Any], column: str | None) -> Any:
    """The value of a column, or of a key inside a cell (`cell.key`); None if there is none."""
    if column is None or column in record or "." not in column:
        return None if column is None else record.get(column)
    name, *keys = column.split(".")
    value = record.get(name)
    for key in keys:
        value = structure_in_text(value)
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _text_cell(record: Mapping[str, Any], column: str | Sequence[str] | None) -> Any:
    """The cell with the answer; the cells of several columns as a list."""
    if column is not None and not isinstance(column, str):
        return [_text_cell(record, one) for one in column]
    value = _cell(record, column)
    inner = column is not None and column not in record
    return json.dumps(value, ensure_ascii=False) if inner and isinstance(value, Mapping) else value


def _completion(prompt: Any, text: Any) -> list[Any] | None:
    """The conversation of a row in TRL's format, with lists of messages as prompt and completion; None for other rows."""
    completion = structure_in_text(text)
    if not (isinstance(completion, list) and completion and all(isinstance(m, Mapping) and "content" in m and "role" in m for m in completion)):
        return None
    question = structure_in_text(prompt)
    turns = question if isinstance(question, list) else [] if question is None else [{"role": "user", "content": question}]
    return [*turns, *completion]


@dataclass(kw_only=True)
class ColumnKeys(BaseSource):
    """The keys of sources that are read by columns.

    columns: see Columns. prompt: the user's text for rows without a prompt column; `<image>` in it is the position of the images.
    captions: `first` trains each row on the first text of its cell, `common` on the one that is there most often (also among its
    references); `all` makes a row of every text; `group` makes one row of the
    rows that have the same images and prompt. All known captions of a held-out row's images and prompt are its references.
    """

    columns: Columns = field(default_factory=Columns)
    prompt: str | None = None
    captions: str = "first"

    default_columns: ClassVar[Mapping[str, str]] = {}  # of a source whose files name their columns differently

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.columns, Columns):
            self.columns = from_keys(Columns, {**self.default_columns, **self.columns}, "data.columns")
        if self.columns.index and not self.columns.choices:
            raise UserError(f"data.columns.index={self.columns.index}: counts the texts of a column of choices; name it with data.columns.choices=COLUMN")
        if self.captions not in CAPTIONS:
            raise UserError(f"data.captions={self.captions}: must be {', '.join(CAPTIONS)}.{nearest(str(self.captions), CAPTIONS)}")
        if self.captions == "group" and self.columns.rejected:
            raise UserError("data.captions=group: makes one row of several, and so loses their rejected answers; leave it out, or data.columns.rejected")

    def group_rows(self) -> bool:
        return self.captions == "group"


@dataclass(kw_only=True)
class PositionKey(BaseSource):
    """image_position: where the images of a conversation stand if its text does not say; see turns.read_turns."""

    image_position: str = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image_position not in POSITIONS:
            raise UserError(f"data.image_position={self.image_position}: must be {', '.join(POSITIONS)}.{nearest(str(self.image_position), POSITIONS)}")
