"""Read the inputs of `predict` and `compare` as samples: images, folders, tables of images and prompts, prepared splits."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_jsonl
from ..data.images import SUFFIXES as IMAGES
from ..data.prepared import PreparedData
from ..data.readers import files as readers
from ..data.sample import BadRow, Message, Row, Sample, assistant_turn
from ..data.sources.cells import UnusableRow, texts
from ..data.sources.columns import Columns
from ..data.sources.turns import prompt_turn

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = ("train", "validation", "test")
# Accepted names of a table's columns; the first one that exists is used.
IMAGE_COLUMNS = ("image", "images", "file_name", "file", "path", "image_path")
PROMPT_COLUMNS = ("prompt", "question", "query", "instruction")
REFERENCE_COLUMNS = ("references", "reference", "answer", "caption", "text")
CHOICE_COLUMNS = ("choices",)
UNKNOWN_ANSWER = "-"  # placeholder for the answer: collators render a whole conversation and cut it before the answer

Prompt = Callable[[], str | None]  # returns the prompt for inputs without one; called only if such an input occurs


@dataclass(frozen=True)
class Asked:
    """One prompt to answer. where: its name for users (a path, `questions.csv:17`). sample: None if `error` says why there is none.

    number: index in a data set's split; None: use the position among the inputs. A sample without known references has an empty
    `references`, and its last message is a placeholder that the model does not see.
    """

    where: str
    sample: Sample | None
    error: str = ""
    number: int | None = None


class AskedRows(Sequence[Asked]):
    """The rows of a split as prompts, read only when asked for."""

    def __init__(self, rows: Sequence[Sample]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        row = self.rows[index]
        return Asked(row.id, row, number=index)


def ask(where: str, paths: Sequence[Path], prompt: str | None, references: Sequence[str] = ()) -> Asked:
    """Image files followed by a question, or at the positions of `<image>` in it."""
    try:
        question = prompt_turn(paths, prompt)
    except UnusableRow as error:
        return Asked(where, None, f"{where}: {error}")
    turns = [question, assistant_turn(references[0] if references else UNKNOWN_ANSWER)]
    return conversation(where, paths, turns, references)


def conversation(where: str, paths: Sequence[Path], messages: list[Message], references: Sequence[str] = (), choices: Sequence[str] = ()) -> Asked:
    """A conversation whose last message is the placeholder of the answer; paths: in the order of its image parts."""
    absolute = [p.expanduser().absolute() for p in paths]
    try:
        root = Path(os.path.commonpath([p.parent for p in absolute])) if absolute else Path.cwd()
    except ValueError:
        return Asked(where, None, f"{where}: its images lie on different drives; copy them to one")
    images = tuple(p.relative_to(root).as_posix() for p in absolute)
    return Asked(where, Sample(where, images, messages, tuple(references), root.as_posix(), choices=tuple(choices)))


def read_inputs(given: object, prompt: Prompt, together: bool, split: str | None, prepared: Callable[[], PreparedData]) -> Sequence[Asked]:
    """Every prompt that `input=given` names, in order. Raises UserError if there is none.

    together: all images of `input` in one prompt. split: which split of a prepared set. prepared: returns the run's own prepared
    set; called for `input=validation`, `train` or `test`.
    """
    names = [] if given is None else [str(g) for g in (given if isinstance(given, list) else [given])]
    if not names or not all(names):
        raise UserError("input must be given: an image, several as [a.jpg,b.jpg], a folder, a CSV or JSONL, or a prepared split")
    if len(names) == 1 and not together:
        rows = _split_rows(names[0], split, prepared)
        if rows is not None:
            return AskedRows(rows)
        if Path(names[0]).suffix.lower() in TABLES and not Path(names[0]).is_dir():
            return read_table(readers.existing(names[0], "input", folder=False), prompt)
    files = [file for name in names for file in find_images(name)]
    if together:
        return [ask(", ".join(f.as_posix() for f in files), files, prompt())]
    return [ask(f.as_posix(), [f], prompt()) for f in files]


def _split_rows(name: str, split: str | None, prepared: Callable[[], PreparedData]) -> Sequence[Sample] | None:
    """The rows of the prepared split that `name` means; None if it means something else."""
    path = Path(name)
    if name in SPLITS and not path.exists():
        return prepared().split(name)
    if (path / "manifest.json").is_file():
        return PreparedData(path).split(split or "validation")
    if path.suffix == ".arrow" and path.stem in SPLITS and (path.parent / "manifest.json").is_file():
        return PreparedData(path.parent).split(path.stem)
    return None


def find_images(name: str) -> list[Path]:
    """One image file, all images below a folder except hidden ones, or those that match a pattern. Raises UserError."""
    if any(c in name for c in "*?[") and not Path(name).exists():
        matches = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).suffix.lower() in IMAGES)
        if not matches:
            raise UserError(f"input={name}: no image file matches")
        return matches
    path = readers.existing(name, "input")
    if path.is_file():
        if path.suffix.lower() in TABLES:
            raise UserError(f"input={name}: a table is given alone, not in a list and without together=true")
        return [path]
    images: list[Path] = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        images += [Path(folder, f) for f in sorted(files) if Path(f).suffix.lower() in IMAGES and not f.startswith(".")]
    if not images:
        raise UserError(f"input={name}: the folder holds no image ({', '.join(IMAGES)}), nor do the folders in it")
    return images


def read_table(path: Path, prompt: Prompt) -> list[Asked]:
    """The rows of a CSV, TSV, JSON, JSONL or Parquet file: image (one, or a list), optionally prompt and references.

    Image paths are relative to the file. `<image>` in a row's own prompt is the position of its next image. Raises UserError.
    """
    inputs: list[Asked] = []
    first: Mapping[str, Any] | None = None
    has_images = False
    for record in readers.read(path):
        if isinstance(record, BadRow):
            inputs.append(Asked(record.where, None, f"{record.where}: {record.reason}"))
            continue
        where, values = record
        # looked for in every record: one of JSON Lines may lack a key that others have
        columns = [next((n for n in names if n in values), None) for names in (IMAGE_COLUMNS, PROMPT_COLUMNS, REFERENCE_COLUMNS, CHOICE_COLUMNS)]
        first, has_images = first or values, has_images or columns[0] is not None
        inputs.append(_table_row(path, where, values, columns, prompt))
    if first is not None and not has_images:
        raise UserError(f"input={path}: has no column image (or {', '.join(IMAGE_COLUMNS[1:])}); it has: {', '.join(map(str, first))}")
    if not inputs:
        raise UserError(f"input={path}: holds no rows")
    return inputs


def _table_row(path: Path, where: str, values: Mapping[str, Any], columns: Sequence[str | None], default_prompt: Prompt) -> Asked:
    image, prompt, reference, choices = (values.get(c) if c else None for c in columns)
    try:
        references = texts(reference, f"column {columns[2]}", optional=True)
    except UnusableRow as error:
        return Asked(where, None, f"{where}: {error}")
    answer = references[0] if references else UNKNOWN_ANSWER
    cells = {"image": image, "prompt": prompt, "answer": answer, "choices": choices}
    row = Columns(image="image", text="answer", prompt="prompt", choices="choices").row(cells, where, None if prompt else default_prompt())
    if not isinstance(row, Row):
        return Asked(where, None, f"{where}: {row.reason}")
    if not row.images:
        return Asked(where, None, f"{where}: names no image")
    if any(isinstance(i, bytes) for i in row.images):
        return Asked(where, None, f"{where}: holds an image's bytes, not its path; prepare the file (mmft prepare data=table) and use the prepared split")
    return conversation(where, [path.parent / str(i) for i in row.images], row.messages, references, row.choices)


def shared_prompt(run: Path | None) -> str | None:
    """The prompt of a run's held-out rows; None if they differ or there are none."""
    rows = read_jsonl(run / "eval" / "tuned.jsonl") if run is not None else []
    prompts = {str(row.get("prompt") or "") for row in rows}
    return prompts.pop() if len(prompts) == 1 else None
