"""Answers side by side in the terminal, at most 80 columns wide."""

from __future__ import annotations

from . import comparison, numbers
from .answers import Side, metric_rows
from .terminal import _table

MARKS = {"good": "green", "near": "yellow", "bad": "red", "none": "dim"}


def sides_table(sides: list[Side]):
    from rich.text import Text

    table = _table("Compared", ("", ""), header=False)
    table.columns[1].justify = "left"
    for side in sides:
        table.add_row(Text(side.label, "bold"), Text(side.about, overflow="fold"))
    return table


def samples_table(sides: list[Side]):
    """One block a sample: number and prompt, reference, then every side's answer with its mark."""
    from rich.text import Text

    table = _table("Samples", ("", "", ""), header=False)
    table.columns[1].justify, table.columns[1].ratio = "left", 1
    table.columns[2].no_wrap = True
    for rows in zip(*(s.rows for s in sides), strict=True):
        first = rows[0]
        table.add_row(Text(str(first["index"]), "bold"), Text(f"{first['id']}\n{first['prompt']}".strip(), "dim"), "")
        references = first["references"]
        if references:
            close = comparison.nearest(str(rows[-1]["prediction"]), references)
            more = f"  (and {len(references) - 1} more)" if len(references) > 1 else ""
            table.add_row(Text("reference", "dim"), Text(close + more), "")
        for side, row in zip(sides, rows, strict=True):
            kind, mark, words = comparison.verdict(row) if references else ("none", "", "")
            table.add_row(Text(side.label), marked(row["prediction"], close if references else None), Text(f"{mark} {words}".strip(), MARKS[kind]))
        table.add_section()
    return table


def marked(text: str, reference: str | None):
    """The text with words that the reference lacks in red."""
    from rich.text import Text

    if not text.strip():
        return Text("(nothing written)", "dim italic")
    pieces = comparison.difference(text, reference) if reference is not None else [("same", text)]
    return Text.assemble(*((piece, "red" if kind == "extra" else "") for kind, piece in pieces if kind != "missing"))


def figures_table(sides: list[Side]):
    """Metrics over the shown samples, a column a side; of two sides the change."""
    from rich.text import Text

    two = len(sides) == 2
    table = _table(f"Over these {len(sides[0].rows)} samples", ("metric", *(s.label for s in sides), *(("change",) if two else ())))
    for row in metric_rows(sides):
        style = {"good": "green", "bad": "red"}.get(row["kind"], "")
        table.add_row(row["name"], *row["values"], *((Text(row["change"] or numbers.MISSING, style),) if two else ()))
    return table


