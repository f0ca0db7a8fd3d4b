"""What `input=` may name, as samples to answer: images, folders, tables of images and prompts, prepared splits."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..data.sample import Bad, Row, Sample, assistant_turn, user_turn
from ..data.sources import readers
from ..data.sources.columns import Columns, texts

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".tga")
TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
SPLITS = ("train", "validation", "test")
# The names a table's columns may have, the first one found counts.
IMAGE_COLUMNS = ("image", "images", "file_name", "file", "path", "image_path")
PROMPT_COLUMNS = ("prompt", "question", "query", "instruction")
REFERENCE_COLUMNS = ("references", "reference", "answer", "caption", "text")
UNKNOWN = "-"  # stands where the answer will be: collators render a whole conversation and cut it before the answer


@dataclass(frozen=True)
class Asked:
    """One prompt to answer. where: how people know it (a path, `questions.csv:17`). sample: None if it cannot be asked: `error`.

    number: its place in a data set's split; None: its place among what is asked.

    A sample without known references has none in `references`; its last message is a stand-in that no model sees.
    """

    where: str
    sample: Sample | None
    error: str = ""
    number: int | None = None


def ask(where: str, paths: list[Path], words: str | None, references: list[str] | tuple[str, ...] = ()) -> Asked:
    """Some image files and a question, the images first."""
    turns = [user_turn(len(paths), words), assistant_turn(references[0] if references else UNKNOWN)]
    return conversation(where, paths, turns, references)


def conversation(where: str, paths: list[Path], messages: list[dict[str, Any]], references: Any = ()) -> Asked:
    """Image files in the order of the image parts of `messages`, whose last one stands where the answer will be."""
    whole = [p.expanduser().absolute() for p in paths]
    try:
        root = Path(os.path.commonpath([p.parent for p in whole])) if whole else Path.cwd()
    except ValueError:
        return Asked(where, None, f"{where}: its images lie on different drives; copy them to one")
    images = tuple(p.relative_to(root).as_posix() for p in whole)
    return Asked(where, Sample(where, images, messages, tuple(references), root.as_posix()))


def read_inputs(given: Any, words: Callable[[], str | None], together: bool, split: str | None, prepared: Callable[[], Any]) -> list[Asked]:
    """Every prompt that `input=given` names, in order. Errors raised: UserError when nothing can be asked.

    words: gives the prompt, asked for when an input brings none. together: all images of `input` in one prompt. split: which split of a
    prepared set. prepared: gives the run's own prepared set, asked for by `input=validation`, `train` or `test`.
    """
    names = [] if given is None else [str(g) for g in (given if isinstance(given, list) else [given])]
    if not names or not all(names):
        raise UserError("input must be given: an image, several as [a.jpg,b.jpg], a folder, a CSV or JSONL, or a prepared split")
    if len(names) == 1 and not together:
        rows = _split_rows(names[0], split, prepared)
        if rows is not None:
            return [Asked(rows[i].id, rows[i], number=i) for i in range(len(rows))]
        if Path(names[0]).suffix.lower() in TABLES and not Path(names[0]).is_dir():
            return read_table(readers.existing(names[0], "input", folder=False), words)
    files = [file for name in names for file in find_images(name)]
    if together:
        return [ask(", ".join(f.as_posix() for f in files), files, words())]
    return [ask(f.as_posix(), [f], words()) for f in files]


def _split_rows(name: str, split: str | None, prepared: Callable[[], Any]) -> Any:
    """The rows of a prepared split that `name` means, or None."""
    from ..data.prepared import PreparedData

    path = Path(name)
    if name in SPLITS and not path.exists():
        return prepared().split(name)
    if (path / "manifest.json").is_file():
        return PreparedData(path).split(split or "validation")
    if path.suffix == ".arrow" and path.stem in SPLITS and (path.parent / "manifest.json").is_file():
        return PreparedData(path.parent).split(path.stem)
    return None


def find_images(name: str) -> list[Path]:
    """One image file, the images below a folder (hidden ones left out), or those of a pattern. Errors raised: UserError."""
    if any(c in name for c in "*?[") and not Path(name).exists():
        found = sorted(Path(p) for p in glob.glob(name, recursive=True) if Path(p).suffix.lower() in IMAGES)
        if not found:
            raise UserError(f"input={name}: no image file matches")
        return found
    path = readers.existing(name, "input")
    if path.is_file():
        if path.suffix.lower() in TABLES:
            raise UserError(f"input={name}: a table is given alone, not in a list and without together=true")
        return [path]
    found = []
    for folder, folders, files in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(folder, f) for f in sorted(files) if Path(f).suffix.lower() in IMAGES and not f.startswith(".")]
    if not found:
        raise UserError(f"input={name}: the folder holds no image ({', '.join(IMAGES)}), nor do the folders in it")
    return found


def read_table(path: Path, words: Callable[[], str | None]) -> list[Asked]:
    """The rows of a CSV, TSV, JSON or JSONL file: image (one, or a list), and where it has them prompt and references.

    Image paths are relative to the file. `<image>` in a row's own prompt marks the place of its next image.
    """
    found: list[Asked] = []
    columns: list[str | None] = []
    for record in readers.read(path):
        if isinstance(record, Bad):
            found.append(Asked(record.where, None, f"{record.where}: {record.reason}"))
            continue
        where, values = record
        if not columns:
            columns = [next((n for n in names if n in values), None) for names in (IMAGE_COLUMNS, PROMPT_COLUMNS, REFERENCE_COLUMNS)]
            if columns[0] is None:
                raise UserError(f"input={path}: has no column image (or {', '.join(IMAGE_COLUMNS[1:])}); it has: {', '.join(map(str, values))}")
        found.append(_table_row(path, where, values, columns, words))
    if not found:
        raise UserError(f"input={path}: holds no rows")
    return found


def _table_row(path: Path, where: str, values: dict[str, Any], columns: list[str | None], words: Callable[[], str | None]) -> Asked:
    image, prompt, reference = (values.get(c) if c else None for c in columns)
    if isinstance(image, str) and image.lstrip().startswith("["):  # a list in a cell of a CSV
        try:
            image = json.loads(image)
        except ValueError:
            return Asked(where, None, f"{where}: the list of images is not valid JSON")
    references = texts(reference)
    answer = references[0] if references else UNKNOWN
    row = Columns(image="image", text="answer", prompt="prompt").row({"image": image, "prompt": prompt, "answer": answer}, where, None if prompt else words())
    if not isinstance(row, Row):
        return Asked(where, None, f"{where}: {row.reason}")
    if not row.images:
        return Asked(where, None, f"{where}: names no image")
    if any(isinstance(i, bytes) for i in row.images):
        return Asked(where, None, f"{where}: holds an image's bytes, not its path; prepare the file (mmft prepare data=table) and use the prepared split")
    return conversation(where, [path.parent / str(i) for i in row.images], row.messages, references)


def shared_prompt(run: Any) -> str | None:
    """The prompt that all held-out rows of a run have in common, None when they differ or are not there."""
    from ..common.files import read_jsonl

    rows = read_jsonl(run / "eval/tuned.jsonl") if run is not None else []
    prompts = {str(row.get("prompt") or "") for row in rows}
    return prompts.pop() if len(prompts) == 1 else None
