"""Tables for the terminal, at most 80 columns wide; plain text without colour codes when the output is not a terminal."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from ..config.library_keys import METRICS
from . import numbers
from .files import is_number

WIDTH = 80


def results_table(summary: dict[str, Any]):
    """summary.json's base metrics against the tuned ones: metric, base, tuned, change."""
    base, tuned = summary.get("base_metrics") or {}, summary.get("metrics") or {}
    table = _table("Held-out rows: base against tuned", ("metric", "base", "tuned", "change"))
    for name in [m for m in METRICS if m in base or m in tuned] + sorted((set(base) | set(tuned)) - set(METRICS)):
        _compare(table, name, base.get(name), tuned.get(name), higher_is_better=True)
    if is_number(summary.get("eval_loss")) or is_number(summary.get("base_eval_loss")):
        _compare(table, "loss", summary.get("base_eval_loss"), summary.get("eval_loss"), higher_is_better=False)
    return table


def _compare(table, name: str, a: Any, b: Any, higher_is_better: bool) -> None:
    from rich.text import Text

    both = is_number(a) and is_number(b) and round(a, 3) != round(b, 3)
    style = "" if not both else "green" if (b > a) == higher_is_better else "red"
    table.add_row(Text(str(name)), numbers.metric(a), Text(numbers.metric(b), "bold"), Text(numbers.change(a, b), style))


def plan_table(plan: dict[str, Any]):
    """lora_plan.json: what is adapted in each part, with the effective scale and the trainable parameters."""
    from rich.text import Text

    # "adapted": linear layers with an adapter, of all linear layers of the part
    title = "Full training" if plan.get("method") == "full" else f"Adapter plan, scope {plan.get('scope', 'language')}"
    table = _table(title, ("part", "adapted", "r", "scale", "trainable", "parameters", "share"))
    table.columns[2].no_wrap, table.columns[2].overflow = False, "fold"  # ranks may be a list: wrap it, cut no number
    for row in plan.get("rows") or ():
        scale = row.get("scale")
        table.add_row(
            Text(str(row.get("part", ""))), f"{row.get('modules', 0)} of {row.get('linear', 0)}", Text(str(row.get("r") or numbers.MISSING)),
            f"{scale:g}" if is_number(scale) else numbers.MISSING, numbers.count(row.get("trainable")), numbers.count(row.get("total")),
            numbers.percent(row.get("trainable"), row.get("total")), style=None if row.get("trainable") else "dim",
        )  # fmt: skip
    trainable, total = plan.get("trainable_parameters"), plan.get("total_parameters")
    if is_number(trainable):
        table.add_section()
        table.add_row("all", "", "", "", numbers.count(trainable), numbers.count(total), numbers.percent(trainable, total), style="bold")
    if plan.get("modules_to_save"):
        table.caption = Text("trained whole: " + ", ".join(map(str, plan["modules_to_save"])))
    return table


def summary_table(summary: dict[str, Any]):
    """The run in a few lines: status, time, speed, memory, losses."""
    loss = summary.get("train_loss") or {}
    speed = summary.get("samples_per_second")
    lines = {
        "run": summary.get("name"),
        "status": summary.get("status"),
        "steps": numbers.count(summary.get("steps")),
        "time": numbers.duration(summary.get("seconds")),
        "of it": _times(summary.get("times") or {}),
        "speed": f"{speed:.1f} samples/s" if is_number(speed) else numbers.MISSING,
        "peak memory": numbers.memory(summary.get("peak_memory_mb")),
        "train loss": f"{numbers.metric(loss.get('first'))} -> {numbers.metric(loss.get('last'))}" if loss else numbers.MISSING,
        "batch": numbers.count(summary.get("effective_batch_size")),
        "seed": summary.get("seed"),
    }
    return pairs_table("Run", {k: v for k, v in lines.items() if v not in (None, numbers.MISSING)})


PARTS = {"load": "load", "cache": "features", "measure_base": "base", "train": "train", "measure_tuned": "tuned"}


def _times(times: dict[str, Any]) -> str:
    """What a run's time went into, parts of less than a twentieth of a second left out; import and preparation came before."""
    before = " + ".join(f"{name} {times[name]:.1f}" for name in ("import", "prepare") if times.get(name, 0) >= 0.05)
    parts = ", ".join(f"{text} {times[name]:.1f}" for name, text in PARTS.items() if times.get(name, 0) >= 0.05)
    return " s; ".join(p for p in (parts, f"before it {before}" if before else "") if p) + " s" if parts or before else numbers.MISSING


def leaderboard_table(board: dict[str, Any]):
    """leaderboard.read's runs, or settings over seeds, the best first; what does not fit in 80 columns wraps."""
    from rich.text import Text

    grouped = bool(board["groups"]) and board["sweep"]
    keys = [k for k in board["keys"] if not grouped or k != "seed"]
    score = f"{board['by']} (n)" if grouped else board["by"]
    both = board["by"] != "eval_loss"
    columns = ("what differs", "base", score, *(["loss"] if both else []), "params", "scale", "time")
    table = _table(f"{board['name']}: {len(board['rows'])} runs, ranked by {board['label']}", columns)
    table.columns[0].no_wrap, table.columns[0].overflow = False, "fold"
    for r in board["groups"] if grouped else board["rows"]:
        finished = grouped or r["status"] == "finished"
        differs = " ".join(f"{k.rpartition('.')[2]}={v}" for k, v in zip(keys, r["values"], strict=True) if v != "") or r.get("run", "")
        if not grouped and not board["sweep"]:  # a point of a sweep is named by what differs already
            differs = f"{r['run']}  {differs}" if differs != r["run"] else differs
        differs += "" if finished else f" {r['status']}"
        signs = "".join(sign for mark, sign in (("best", "*"), ("cheapest within 1 s.e.", "+")) if mark in r["marks"])
        value = numbers.metric(r["score"]) if not grouped else f"{numbers.metric(r['mean'])} \u00b1 {numbers.metric(r['sd'])} ({r['n']})"
        first = Text(f"{signs or ' '} {differs}" + ("  (!)" if r.get("flags") else ""))
        table.add_row(first, numbers.metric(r["base"]), Text(value, "bold"), *([numbers.metric(r["loss"])] if both else []),
                      numbers.count(r["trainable"]), numbers.plain(r["scale"]), numbers.duration(r["seconds"]), style=None if finished else "dim")  # fmt: skip
    legend = [t for t, there in (("* best", True), ("+ cheapest within one standard error of it", True), ("(!) not on equal terms", any(r["flags"] for r in board["rows"]))) if there]
    table.caption = Text("\n".join([", ".join(legend), *board["notes"]]))
    return table


def pairs_table(title: str, values: dict[str, Any]):
    """Names and values, one a line (the start and the end of a run). The values are shown as they are."""
    from rich.text import Text

    table = _table(title, ("", ""), header=False)
    table.columns[1].justify = "left"
    for name, value in values.items():
        table.add_row(Text(str(name), "dim"), Text(str(value), overflow="fold"))
    return table


def show(*tables, file: TextIO | None = None) -> None:
    """Print tables to a stream (standard output): in colour on a terminal, never wider than 80 columns."""
    from rich.console import Console

    file = file or sys.stdout
    terminal = bool(getattr(file, "isatty", lambda: False)())
    width = min(WIDTH, Console(file=file).width) if terminal else WIDTH
    console = Console(file=file, width=width, highlight=False, force_terminal=terminal, no_color=None if terminal else True)
    for table in tables:
        console.print()
        console.print(table)


def _table(title: str, columns: tuple[str, ...], header: bool = True):
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
