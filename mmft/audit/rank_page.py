"""Show a ranking of training rows: a page that opens offline and writes a file of ids, and a table for the terminal."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..reports import numbers
from ..reports.html import render
from .page import percentile_name
from .rank import RankedRow, Ranking
from .survey import SHARES

if TYPE_CHECKING:
    from rich.table import Table

    from ..common.records import AnswerRecord

SHOWN = 100  # rows on the page
SIDE = 260  # pixels of a picture
BARS = 24  # of the histogram of losses
FIRST = 10  # rows in the terminal


def rank_page(run: str, ranking: Ranking, worst: Sequence[RankedRow], about: str, files: Mapping[str, str], command: str) -> str:
    """The page's text. worst: the rows that are listed for removal. files: what was written, by what it is. command: leaves the rows out."""
    answers = {record["id"]: record for record in ranking.answers}
    listed = {row.sample.id for row in worst}
    return render(
        "rank.html.j2", date=datetime.datetime.now().strftime("%Y-%m-%d %H:%M"), run=run, about=about, files=files, command=command,
        rows=[_card(number, row, row.sample.id in listed, answers.get(row.sample.id)) for number, row in enumerate(ranking.rows[:SHOWN], 1)],
        worst=len(worst), count=len(ranking.rows), left_out=len(ranking.left_out), shares=[percentile_name(s) for s in SHARES],
        percentiles=_percentiles(ranking), bars=_bars(ranking, listed), based=any(row.base_loss is not None for row in ranking.rows),
    )  # fmt: skip


def _card(number: int, row: RankedRow, listed: bool, answer: AnswerRecord | None) -> dict[str, Any]:
    from ..reports.pictures import boxes_of, shown_pictures

    sample = row.sample
    record: AnswerRecord = {"root": sample.root, "images": list(sample.images), "reference_boxes": sample.regions}
    return {
        "number": number, "id": sample.id, "listed": listed, "loss": numbers.metric(row.loss), "base": numbers.metric(row.base_loss), "tokens": row.tokens,
        "pictures": shown_pictures(record, SIDE, 3, [boxes_of("tuned", "answer", answer)]), "prompt": sample.prompt_text, "label": sample.answer_text,
        "answer": None if answer is None else answer["prediction"], "same": answer is not None and answer["prediction"] == sample.answer_text,
    }  # fmt: skip


def _percentiles(ranking: Ranking) -> list[tuple[str, list[str]]]:
    columns = {"tuned model": [row.loss for row in ranking.rows], "base model": [row.base_loss for row in ranking.rows if row.base_loss is not None]}
    return [(name, [numbers.metric(v.item()) for v in np.percentile(values, SHARES, method="inverted_cdf")]) for name, values in columns.items() if values]


def _bars(ranking: Ranking, listed: set[str]) -> list[dict[str, Any]]:
    """A histogram of the tuned model's losses; each bar says how many of its rows are listed."""
    losses = np.array([row.loss for row in ranking.rows])
    edges = np.linspace(0, losses.max() or 1.0, BARS + 1)
    place = np.clip(np.searchsorted(edges, losses, side="right") - 1, 0, BARS - 1)
    chosen = np.array([row.sample.id in listed for row in ranking.rows])
    count, marked = np.bincount(place, minlength=BARS), np.bincount(place[chosen], minlength=BARS)
    tallest = np.sqrt(count.max())  # the root keeps bars of few rows visible
    return [{"title": f"{edges[i]:.2f} to {edges[i + 1]:.2f}: {count[i]} rows, {marked[i]} of them listed", "height": round(100 * float(np.sqrt(count[i]) / tallest), 1),
             "marked": round(100 * float(np.sqrt(marked[i]) / tallest), 1), "edge": f"{edges[i]:.2g}"} for i in range(BARS)]  # fmt: skip


def worst_table(ranking: Ranking) -> Table:
    """The first rows for the terminal."""
    from rich.text import Text

    from ..reports.terminal import new_table

    answers = {record["id"]: record["prediction"] for record in ranking.answers}
    table = new_table(f"Training rows with the highest loss, of {len(ranking.rows)}", ("row", "loss", "base", "label and the tuned model's answer"))
    table.columns[0].no_wrap, table.columns[0].overflow, table.columns[0].max_width = False, "fold", 20
    table.columns[3].justify, table.columns[3].no_wrap, table.columns[3].ratio = "left", False, 1
    for row in ranking.rows[:FIRST]:
        label = Text(_short(row.sample.answer_text))
        if (answer := answers.get(row.sample.id)) is not None:
            label = Text.assemble(label, "\n", (_short(answer), "dim"))
        table.add_row(Text(row.sample.id), numbers.metric(row.loss), numbers.metric(row.base_loss), label)
    return table


def _short(text: str, longest: int = 90) -> str:
    text = " ".join(str(text).split())
    return text if len(text) <= longest else f"{text[:longest]}…"
