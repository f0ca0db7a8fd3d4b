"""Tables for the terminal, at most 80 columns wide; plain text without colour codes when the output is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TextIO

from ..common.records import EvaluationSummary, FirstAndLast, PlanReport, Summary
from . import answers, numbers
from .answers_page import Side, figure_rows, side_notes
from .numbers import is_number
from .ranking import BEST, CHEAPEST, NOISE, Leaderboard, RankedRun, SeedGroup
from .tables import answer_notes, expert_notes, metric_rows, plan_rows, source_table

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

WIDTH = 80
MAX_KEPT = 2  # sets of evaluation.keep with a column in the terminal's leaderboard; its page has all
COLOURS = {"good": "green", "near": "yellow", "bad": "red", "none": "dim", "": ""}
# Keys of summary.json's times during a run and the words shown for them.
STAGES = {"load": "load", "cache": "features", "measure_base": "base", "train": "train", "measure_tuned": "tuned"}


# --- a run ------------------------------------------------------------------------------------------------------


def results_tables(summary: Summary | EvaluationSummary) -> list[Table]:
    """Base metrics against the tuned ones: metric, base, tuned, change and its interval; of the run's own data, then of each kept set."""
    return [_results_table(summary, kept) for kept in (None, *(summary.get("keep") or {})) if metric_rows(summary, kept)]


def _results_table(summary: Summary | EvaluationSummary, kept: str | None) -> Table:
    from rich.text import Text

    rows = metric_rows(summary, kept)
    compared = ("95 % interval", "p") if any(row["interval"] for row in rows) else ()
    table = new_table("Held-out rows: base against tuned" if kept is None else f"Kept: {kept}, base against tuned", ("metric", "base", "tuned", "change", *compared))
    for row in rows:
        name = "loss" if row["name"] == "eval_loss" else row["name"]
        further = (row["interval"], row["p"])[: len(compared)]
        table.add_row(Text(name), row["base"], Text(row["tuned"], "bold"), Text(row["change"], COLOURS[row["kind"]]), *further)
    notes = answer_notes(summary, kept)
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def sources_table(summary: Summary | EvaluationSummary) -> Table | None:
    """The sources of a mix side by side; None without one."""
    from rich.text import Text

    shown = source_table(summary, short=True)
    if shown is None:
        return None
    table = new_table("By source: base \u2192 tuned" if summary.get("base_metrics") else "By source", ("", *shown["sources"]))
    for label, name, cells in shown["rows"]:
        table.add_row(Text(name or label.lower()), *cells)
    return table


def plan_table(plan: PlanReport) -> Table:
    """lora_plan.json: what is adapted in each part, with the effective scale and the trainable parameters."""
    from rich.text import Text

    # "adapted": linear layers with an adapter, of all linear layers of the part
    title = "Full training" if plan.get("method") == "full" else f"Adapter plan, scope {plan.get('scope', 'language')}"
    table = new_table(title, ("part", "method", "adapted", "r", "scale", "rate", "trained", "of", "share"))
    table.columns[3].no_wrap, table.columns[3].overflow = False, "fold"  # ranks may be a list, which is wrapped
    for row in plan_rows(plan):
        style = "dim" if row["idle"] else None
        table.add_row(
            Text(row["part"]), row["method"], row["adapted"], Text(row["r"]), row["scale"], row["rate"], row["trainable"], row["total"], row["share"], style=style
        )
    trainable, total = plan.get("trainable_parameters"), plan.get("total_parameters")
    if is_number(trainable):
        table.add_section()
        table.add_row("all", "", "", "", "", "", numbers.count(trainable), numbers.count(total), numbers.percent(trainable, total), style="bold")
    saved = list(map(str, plan.get("modules_to_save") or ()))
    notes = [f"trained whole: {', '.join(saved[:4])}{f' and {len(saved) - 4} others' if len(saved) > 4 else ''}"] if saved else []
    notes += [*expert_notes(plan), *(plan.get("notes") or ())]
    table.caption = Text("\n".join(notes)) if notes else None
    return table


def _first_and_last(value: FirstAndLast) -> str:
    """`9.556 -> 3.572`, or one number where a single step was logged."""
    first, last = value["first"], value["last"]
    return numbers.metric(first) if first == last else f"{numbers.metric(first)} -> {numbers.metric(last)}"


def summary_table(summary: Summary) -> Table:
    """The run in a few lines: status, time, speed, memory, losses."""
    loss, reward, speed = summary.get("train_loss"), summary.get("reward"), summary.get("samples_per_second")
    lines = {
        "run": summary.get("name"),
        "status": summary.get("status"),
        "steps": numbers.count(summary.get("steps")),
        "time": numbers.duration(summary.get("seconds")),
        "of it": _times(summary.get("times") or {}),
        "speed": f"{speed:.1f} samples/s" if is_number(speed) else numbers.MISSING,
        "peak memory": numbers.memory(summary.get("peak_memory_mb")),
        "reward": _first_and_last(reward) if reward else None,
        "train loss": _first_and_last(loss) if loss else numbers.MISSING,
        "batch": numbers.count(summary.get("effective_batch_size")),
        "seed": summary.get("seed"),
    }
    return pairs_table("Run", {k: v for k, v in lines.items() if v not in (None, numbers.MISSING)})


def _times(times: Mapping[str, float]) -> str:
    """The stages of a run that took at least 0.05 s; import and preparation came before the run's own time."""
    before = " + ".join(f"{name} {times[name]:.1f}" for name in ("import", "prepare") if times.get(name, 0) >= 0.05)
    stages = ", ".join(f"{text} {times[name]:.1f}" for name, text in STAGES.items() if times.get(name, 0) >= 0.05)
    return " s; ".join(p for p in (stages, f"before it {before}" if before else "") if p) + " s" if stages or before else numbers.MISSING


# --- several runs -------------------------------------------------------------------------------------------------


def leaderboard_table(board: Leaderboard) -> Table:
    """The runs, or settings over seeds, the best first; what does not fit in 80 columns wraps."""
    from rich.text import Text

    grouped = bool(board.groups) and board.sweep
    keys = board.setting_keys if grouped else board.keys
    score = f"{board.by} (n)" if grouped else board.by
    with_loss = board.by != "eval_loss"
    kept = [name for name in board.main_kept if name != board.by][:MAX_KEPT]
    columns = ("what differs", "base", score, *(["loss"] if with_loss else []), *(board.labels[name] for name in kept), "params", "scale", "time")
    table = new_table(board.heading, columns)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"

    for r in board.groups if grouped else board.rows:
        finished = isinstance(r, SeedGroup) or r.status == "finished"
        differs = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in zip(keys, r.values, strict=True) if v != "")
        if isinstance(r, RankedRun):
            if not board.sweep or not differs:  # a point of a sweep is named by what differs already
                differs = f"{r.run}  {differs}" if differs else r.run
            differs += "" if finished else f" {r.status}"
        else:
            differs = differs or "all seeds"
        signs = "".join(sign for mark, sign in ((BEST, "*"), (CHEAPEST, "+"), (NOISE, "~")) if mark in r.marks)
        flag = "  (!)" if isinstance(r, RankedRun) and r.flags else ""
        value = numbers.metric(r.score) if isinstance(r, RankedRun) else f"{numbers.metric(r.mean)} \u00b1 {numbers.metric(r.sd)} ({r.n})"
        table.add_row(Text(f"{signs or ' '} {differs}{flag}"), numbers.metric(r.base), Text(value, "bold"), *([numbers.metric(r.loss)] if with_loss else []),
                      *(numbers.metric(r.metrics.get(name)) for name in kept), numbers.count(r.trainable), numbers.plain(r.scale), numbers.duration(r.seconds), style=None if finished else "dim")  # fmt: skip
    legend = ["* best", "+ cheapest within one standard error of it", *(["~ within noise of the best"] if any(NOISE in r.marks for r in board.rows) else []), *(["(!) not on equal terms"] if any(r.flags for r in board.rows) else [])]
    table.caption = Text("\n".join([", ".join(legend), *board.notes]))
    return table


# --- answers side by side -------------------------------------------------------------------------------------------


def sides_table(sides: Sequence[Side]) -> Table:
    from rich.text import Text

    table = new_table("Compared", ("", ""), header=False)
    table.columns[1].justify = "left"
    for side in sides:
        table.add_row(Text(side.label, "bold"), Text(side.about, overflow="fold"))
    return table


def samples_table(sides: Sequence[Side]) -> Table:
    """One block for each sample: number and prompt, reference, then every side's answer with its mark."""
    from rich.text import Text

    table = new_table("Samples", ("", "", ""), header=False)
    table.columns[1].justify, table.columns[1].ratio = "left", 1
    table.columns[2].no_wrap = True
    for rows in zip(*(s.rows for s in sides), strict=True):
        first = rows[0]
        table.add_row(Text(str(first["index"]), "bold"), Text(f"{first['id']}\n{first['prompt']}".strip(), "dim"), "")
        references, nearest = first["references"], None
        if references:
            nearest = answers.nearest_reference(str(rows[-1]["prediction"]), references)
            more = f"  (and {len(references) - 1} more)" if len(references) > 1 else ""
            table.add_row(Text("reference", "dim"), Text(nearest + more), "")
        for side, row in zip(sides, rows, strict=True):
            kind, mark, words = answers.verdict(row) if references else ("none", "", "")
            table.add_row(Text(side.label), _marked(str(row["prediction"]), nearest), Text(f"{mark} {words}".strip(), COLOURS[kind]))
        table.add_section()
    return table


def _marked(text: str, reference: str | None) -> Text:
    """The text with words that the reference lacks in red."""
    from rich.text import Text

    if not text.strip():
        return Text("(nothing written)", "dim italic")
    pieces = answers.difference(text, reference) if reference is not None else [("same", text)]
    return Text.assemble(*((piece, "red" if kind == "extra" else "") for kind, piece in pieces if kind != "missing"))


def figures_table(sides: Sequence[Side], title: str = "") -> Table:
    """Metrics over the rows of the sides, a column for each; of two sides the change and its interval."""
    from rich.text import Text

    rows = figure_rows(sides)
    two, compared = len(sides) == 2, any(row["interval"] for row in rows)
    head = ("metric", *(s.label for s in sides), *(("change",) if two else ()), *(("95 % interval", "p") if compared else ()))
    table = new_table(title or f"Over these {len(sides[0].rows)} samples", head)
    for row in rows:
        change = (Text(row["change"] or numbers.MISSING, COLOURS[row["kind"]]),) if two else ()
        table.add_row("loss" if row["name"] == "eval_loss" else row["name"], *row["values"], *change, *((row["interval"], row["p"]) if compared else ()))
    table.caption = Text("\n".join(side_notes(sides)))
    return table


# --- printing -------------------------------------------------------------------------------------------------------


def pairs_table(title: str, values: Mapping[str, object]) -> Table:
    """Names and values, one pair a line. The values are shown as they are."""
    from rich.text import Text

    table = new_table(title, ("", ""), header=False)
    table.columns[1].justify = "left"
    for name, value in values.items():
        table.add_row(Text(str(name), "dim"), Text(str(value), overflow="fold"))
    return table


def show(*tables: Table, file: TextIO | None = None) -> None:
    """Print tables to a stream (standard output): in colour on a terminal, never wider than 80 columns."""
    from rich.console import Console

    file = file or sys.stdout
    terminal = bool(getattr(file, "isatty", lambda: False)())
    width = min(WIDTH, Console(file=file).width) if terminal else WIDTH
    console = Console(file=file, width=width, highlight=False, force_terminal=terminal, no_color=None if terminal else True)
    for table in tables:  # title and notes are not wrapped at the width of the table, which may have two narrow columns
        title, notes, table.title, table.caption = table.title, table.caption, None, None
        console.print()
        if title:
            console.print(title, style="bold")
        console.print(table)
        if notes:
            console.print(notes, style="dim")
        table.title, table.caption = title, notes


def new_table(title: str, columns: Sequence[str], header: bool = True) -> Table:
    """An empty table in the style of all tables: the first column left, the others right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title), title_style="bold", caption_style="dim", title_justify="left", caption_justify="left",
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=header,
    )  # fmt: skip
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=i == 0 or header)
    return table
