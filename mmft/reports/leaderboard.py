"""The leaderboard of a folder of runs: what differs between them and how good each became, from their files alone."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

from ..common.errors import UserError, nearest
from ..common.files import read_json, read_jsonl, read_text, read_yaml
from ..config.library_keys import METRICS
from . import fairness, numbers, seeds, strip, sweep_plots
from .files import is_number
from .markdown import cell
from .page import LABELS, flatten, main_metrics, render

NOT_COMPARED = ("run_dir", "name", "output_dir", "objective")  # they differ between any two runs, or change none
ASIDE = ("earlier",)  # of a sweep: tries that were repeated
LOWER_IS_BETTER = ("eval_loss",)


def read(folder: Path, by: str | None = None) -> dict[str, Any]:
    """What the page, the tables and the CSV show; "rows" are the runs, the best first. Errors raised: UserError."""
    found = sorted({p.parent for pattern in ("*/snapshot.yaml", "*/*/snapshot.yaml") for p in folder.glob(pattern)})
    found = [run for run in found if run.relative_to(folder).parts[0] not in ASIDE]
    if not found:
        raise UserError(f"run={folder}: holds no run (no snapshot.yaml here, nor one or two folders below)")
    plan = read_json(folder / "plan.json")
    summaries = [read_json(run / "summary.json") for run in found]
    by = _ranked_by(by, found, summaries, plan)
    settings = [dict(flatten(read_yaml(run / "snapshot.yaml"))) for run in found]
    differing = [k for k in {k: 0 for s in settings for k in s} if k not in NOT_COMPARED and len({s.get(k) for s in settings}) > 1]
    typed = [_typed(run) for run in found]
    keys = _keys(differing, typed, bool(plan))
    rows = []
    for run, summary, own, words in zip(found, summaries, settings, typed, strict=True):
        value, base = (_value(summary, by, prefix) for prefix in ("", "base_"))
        scales = {r["scale"] for r in read_json(run / "lora_plan.json").get("rows") or () if is_number(r.get("scale"))}
        rows.append({
            "run": run.relative_to(folder).as_posix(), "status": str(summary.get("status") or "unfinished"),
            "values": [words.get(k, own.get(k, "")) for k in keys], "score": value, "base": base, "loss": summary.get("eval_loss"),
            "trainable": summary.get("trainable_parameters"), "scale": max(scales) if scales else None, "memory": summary.get("peak_memory_mb"),
            "seconds": summary.get("seconds"), "speed": summary.get("samples_per_second"), "metrics": summary.get("metrics") or {},
            "reason": str(summary.get("reason") or ""), "report": (run / "report.html").is_file(), "settings": own, "summary": summary,
            "path": run, "marks": [], "flags": [],
        })  # fmt: skip
    sign = 1 if by in LOWER_IS_BETTER else -1
    rows.sort(key=lambda r: (not is_number(r["score"]), sign * r["score"] if is_number(r["score"]) else 0, r["loss"] if is_number(r["loss"]) else 1e9, r["run"]))
    board: dict[str, Any] = {"name": folder.resolve().name, "by": by, "label": LABELS.get(by, "Held-out loss"), "sign": sign, "sweep": bool(plan), "keys": keys, "rows": rows,
             "differing": [k for k in differing if not k.startswith(("logger", "task"))], "notes": []}  # fmt: skip
    missing = [p["name"] for p in plan.get("points") or () if not (folder / p["name"]).is_dir()]
    if missing:
        board["notes"].append(f"{len(missing)} planned points have no run yet: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")
    board["groups"] = seeds.groups(board)
    fairness.check(board)
    seeds.mark(board)
    return board


def _ranked_by(by: str | None, found: list[Path], summaries: list[dict[str, Any]], plan: dict[str, Any]) -> str:
    measured = [k for k in METRICS if any(is_number((s.get("metrics") or {}).get(k)) for s in summaries)]
    if by is None:
        objective = plan.get("objective")
        if objective in (*measured, "eval_loss"):
            return objective
        answered = next((rows for run in found if (rows := read_jsonl(run / "eval" / "tuned.jsonl"))), [])
        return main_metrics(answered)[0] if measured else "eval_loss"
    if by not in (*measured, "eval_loss"):
        raise UserError(f"by={by}: none of these runs measured it.{nearest(by, [*measured, 'eval_loss'])} There are: {', '.join([*measured, 'eval_loss'])}.")
    return by


def _keys(differing: list[str], typed: list[dict[str, str]], swept: bool) -> list[str]:
    """The columns: of a sweep the words that were typed differently (what follows from them is listed apart), else all that differs."""
    if not swept:
        return differing
    named = {k: 0 for words in typed for k in words}
    return [k for k in named if k not in NOT_COMPARED and len({w.get(k) for w in typed}) > 1] or differing


def _typed(run: Path) -> dict[str, str]:
    words = (read_text(run / "overrides.txt") or "").splitlines()
    return {w.split("=", 1)[0]: w.split("=", 1)[1] for w in words if "=" in w}


def _value(summary: dict[str, Any], key: str, prefix: str) -> Any:
    return summary.get(prefix + key) if key == "eval_loss" else (summary.get(f"{prefix}metrics") or {}).get(key)


def write(folder: Path, board: dict[str, Any]) -> list[Path]:
    """report.html, report.md and leaderboard.csv of the folder."""
    metrics = [m for m in METRICS if m != board["by"] and any(is_number(r["metrics"].get(m)) for r in board["rows"])]
    page = render("leaderboard.html.j2", board=board, numbers=numbers, metrics=metrics, labels=LABELS, plots=sweep_plots.draw(board), strip=strip.build(board))
    wrote = []
    for name, text in (("report.html", page), ("report.md", markdown(board)), ("leaderboard.csv", table(board))):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, folder / name)
        wrote.append(folder / name)
    return wrote


def markdown(board: dict[str, Any]) -> str:
    head = ["run", *board["keys"], "status", "base", board["label"], "loss", "trainable", "time", "scale", "peak memory", "samples/s", ""]
    lines = [f"# {board['name']}: {len(board['rows'])} runs, ranked by {board['label']}", "", _row(head), _row(["---"] * len(head))]
    for r in board["rows"]:
        run = f"[{cell(r['run'])}]({r['run'].replace(' ', '%20')}/report.html)" if r["report"] else cell(r["run"])
        more = [numbers.plain(r["scale"]), numbers.memory(r["memory"]), numbers.plain(r["speed"]), ", ".join([*r["marks"], *map(cell, r["flags"])])]
        lines.append(_row([run, *map(cell, r["values"]), cell(r["status"]), *figures(r), *more]))
    if board["groups"]:
        keys = [k for k in board["keys"] if k != "seed"]
        head = [*keys, "seeds", board["label"], "spread", "loss", "trainable", "scale", ""]
        lines += ["", "## Over seeds", "", _row(head), _row(["---"] * len(head))]
        for g in board["groups"]:
            lines.append(_row([*map(cell, g["values"]), str(g["n"]), numbers.metric(g["mean"]), numbers.metric(g["sd"]), numbers.metric(g["loss"]),
                               numbers.count(g["trainable"]), numbers.plain(g["scale"]), ", ".join(g["marks"])]))  # fmt: skip
    return "\n".join([*lines, *(f"\n{cell(note)}" for note in board["notes"])]) + "\n"


def table(board: dict[str, Any]) -> str:
    """leaderboard.csv: a line a run, numbers in full."""
    out = io.StringIO()
    metrics = [m for m in METRICS if any(m in r["metrics"] for r in board["rows"])]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["run", "status", *board["keys"], "eval_loss", *metrics, "trainable_parameters", "scale", "peak_memory_mb", "seconds",
                     "samples_per_second", "marks", "flags", "reason"])  # fmt: skip
    for r in board["rows"]:
        values = [r["loss"], *(r["metrics"].get(m) for m in metrics), r["trainable"], r["scale"], r["memory"], r["seconds"], r["speed"]]
        # a spreadsheet takes a text that starts so for a formula
        words = [f"'{w}" if w[:1] in ("=", "+", "@") else w for w in [r["run"], r["status"], *map(str, r["values"])]]
        writer.writerow([*words, *("" if v is None else v for v in values), "; ".join(r["marks"]), "; ".join(r["flags"]), r["reason"]])
    return out.getvalue()


def figures(row: dict[str, Any]) -> list[str]:
    """base, score, loss, trainable parameters, time: as people read them."""
    return [numbers.metric(row["base"]), numbers.metric(row["score"]), numbers.metric(row["loss"]), numbers.count(row["trainable"]),
            numbers.duration(row["seconds"])]  # fmt: skip


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
