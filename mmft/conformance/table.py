"""The table of conformance results: one row for each model type or checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .checks import CHECKS, CheckResult

MARKS = {True: "yes", False: "**no**", None: "-"}


@dataclass(frozen=True)
class TableRow:
    """results: empty for a type that was refused; then `refused` says why."""

    name: str
    model_class: str
    results: Sequence[CheckResult] = ()
    refused: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(r.passed is not False for r in self.results)


def markdown(rows: Sequence[TableRow], transformers_version: str) -> str:
    """The table with a line of totals; failures and refusals are explained below it."""
    head = ["model", "class", *CHECKS]
    lines = [f"{sum(r.passed for r in rows)} of {len(rows)} pass every check that applies (transformers {transformers_version}).", ""]
    lines += [_line(head), _line(["---"] * len(head)), *(_line(_cells(row)) for row in rows)]
    notes = [f"- {row.name}: refused, {row.refused}" for row in rows if row.refused]
    notes += [f"- {row.name}, {r.name}: {r.detail}" for row in rows for r in row.results if r.passed is False]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _cells(row: TableRow) -> list[str]:
    by_name = {r.name: r for r in row.results}
    marks = [MARKS[by_name[name].passed] if name in by_name else "refused" for name in CHECKS]
    return [row.name, row.model_class, *marks]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
