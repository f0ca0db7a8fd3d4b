"""The list of runs (`mmft runs`) as a terminal table, CSV, JSON and page, and the differences of two runs."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import numbers
from .html import render, write_text
from .numbers import is_number
from .terminal import WIDTH, new_table

if TYPE_CHECKING:
    from rich.table import Table

NAME_WIDTH = 22  # characters of a line of a run's name in the terminal, at least
GAP = 3  # spaces between two columns of the terminal's tables
FORMATS = (".csv", ".json", ".html")


@dataclass
class ListedRun:
    """One row. values: of the list's columns, as they are. report: whether report.html exists below `path`."""

    name: str
    path: Path
    values: list[Any]
    report: bool


@dataclass
class RunsList:
    """columns: of every row's values. chosen: those that the command named. by: what it is sorted by, or "". found: number of runs
    before the condition and `top`."""

    folder: Path
    columns: list[str]
    chosen: list[str]
    rows: list[ListedRun]
    by: str
    found: int

    def plain(self) -> list[dict[str, Any]]:
        """One mapping for each run, values not rounded."""
        head = ["run", *self.columns]
        return [dict(zip(head, [row.name, *row.values], strict=True)) for row in self.rows]


@dataclass
class Differences:
    """How two runs differ: key -> (value of the first, value of the second), only where they differ; all scores."""

    runs: list[str]
    config: dict[str, tuple[Any, Any]]
    conditions: dict[str, tuple[Any, Any]]
    scores: dict[str, tuple[Any, Any]]


def table(listed: RunsList) -> Table:
    """At most 80 columns: names wrap, and columns that do not fit are named below the table."""
    from rich.text import Text

    order = f", by {listed.by}" if listed.by else ", the newest first"
    title = f"{listed.folder.as_posix()}: {len(listed.rows)} of {listed.found} runs{order}"
    cells = {c: [text(c, row.values[i]) for row in listed.rows] for i, c in enumerate(listed.columns)}
    heads = {c: ("base\n" if c.startswith("base.") else "") + c.rpartition(".")[2].replace("_", "\n") for c in listed.columns}
    shown, left = [], WIDTH - NAME_WIDTH
    for column in [*listed.chosen, *(c for c in listed.columns if c not in listed.chosen)]:
        width = GAP + max(len(piece) for one in (*cells[column], heads[column]) for piece in one.split("\n"))
        if width <= left:
            shown.append(column)
            left -= width
    columns = [c for c in listed.columns if c in shown]
    result = new_table(title, ("run", *(heads[c] for c in columns)))
    result.columns[0].no_wrap, result.columns[0].overflow, result.columns[0].min_width = False, "fold", NAME_WIDTH
    for i, row in enumerate(listed.rows):
        result.add_row(Text(row.name), *(Text(cells[c][i]) for c in columns))
    missing = [c for c in listed.columns if c not in shown]
    if missing:
        result.caption = Text(f"No place for {', '.join(missing)}; out=FILE.csv or out=FILE.html has all columns.")
    return result


def text(column: str, value: Any) -> str:
    """A value as it is shown."""
    if value is None or value == []:
        return numbers.MISSING
    if column == "seconds":
        return numbers.duration(value)
    if column == "started":
        return str(value)[5:]  # without the year; files have it
    if column == "disk":
        return numbers.memory(value / 2**20)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and is_number(value):
        return numbers.metric(value) if 0.001 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping) else str(value)


def write(listed: RunsList, path: Path) -> Path:
    """Write NAME.csv, NAME.json or NAME.html; values in CSV and JSON are not rounded."""
    head = ["run", *listed.columns]
    if path.suffix == ".html":
        numeric = {i for i in range(len(listed.columns)) if any(is_number(row.values[i]) for row in listed.rows)}
        return write_text(path, render("runs.html.j2", listed=listed, text=text, numeric=numeric))
    if path.suffix == ".json":
        return write_text(path, json.dumps(listed.plain(), ensure_ascii=False, indent=2) + "\n")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([row.name, *("" if v is None else json.dumps(v, ensure_ascii=False) if isinstance(v, (list, Mapping)) else v for v in row.values)] for row in listed.rows)
    return write_text(path, out.getvalue())


def difference_table(title: str, names: Sequence[str], values: Mapping[str, tuple[Any, Any]]) -> Table:
    """key, the first run's value, the second's; a note where nothing differs."""
    from rich.text import Text

    result = new_table(title, ("", *names))
    for column in result.columns:
        column.no_wrap, column.overflow = False, "fold"
    for key, (a, b) in values.items():
        result.add_row(Text(key), Text(text(key, a)), Text(text(key, b)))
    if not values:
        result.caption = Text("no difference")
    return result
