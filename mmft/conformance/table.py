"""The table of conformance results: one row for each model type or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checks import CHECKS, CheckResult

MARKS = {True: "yes", False: "**no**", None: "-"}
NOT_BUILT = "not built"


@dataclass(frozen=True)
class TableRow:
    """results: empty for a type that was refused (then `refused` says why) or not built. architecture, template: described in words."""

    name: str
    model_class: str
    results: Sequence[CheckResult] = ()
    refused: str = ""
    architecture: str = ""
    template: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(r.passed is not False for r in self.results)


def totals(rows: Sequence[TableRow], things: str) -> str:
    """The line that counts the rows that pass, e.g. "3 of 5 types pass every check that applies"."""
    return f"{sum(r.passed for r in rows)} of {len(rows)} {things} pass every check that applies"


def markdown(rows: Sequence[TableRow], transformers_version: str, things: str = "models") -> str:
    """The line of totals and the table; failures and refusals are explained below it. things: what the rows are."""
    described = any(row.architecture or row.template for row in rows)
    head = ["model", "class", *CHECKS, *(["architecture", "chat template"] if described else [])]
    lines = [f"{totals(rows, things)} (transformers {transformers_version}).", ""]
    lines += [_line(head), _line(["---"] * len(head))]
    lines += [_line([*_cells(row), *([row.architecture, row.template] if described else [])]) for row in rows]
    notes = [f"- {row.name}: refused: {row.refused}" for row in rows if row.refused]
    notes += [f"- {row.name}, {r.name}: {r.detail}" for row in rows for r in row.results if r.passed is False]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _cells(row: TableRow) -> list[str]:
    by_name = {r.name: r for r in row.results}
    other = "refused" if row.refused else NOT_BUILT
    return [row.name, row.model_class, *(MARKS[by_name[name].passed] if name in by_name else other for name in CHECKS)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
