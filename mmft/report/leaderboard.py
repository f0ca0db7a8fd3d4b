"""The leaderboard of a folder of runs: what differs between them and how good each became, from their files alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ..config import nearest
from ..errors import UserError
from ..metrics import METRICS
from . import numbers
from .files import is_number, read_json, read_jsonl, read_text
from .markdown import cell
from .page import LABELS, flatten, main_metrics, render

NOT_COMPARED = ("run_dir", "name", "output_dir")  # they differ between any two runs


def read(folder: Path, by: str | None = None) -> dict[str, Any]:
    """{"name", "by", "label", "keys": settings that differ, "rows": runs, the best first}. Errors raised: UserError."""
    found = sorted({p.parent for pattern in ("*/snapshot.yaml", "*/*/snapshot.yaml") for p in folder.glob(pattern)})
    if not found:
        raise UserError(f"run={folder}: holds no run (no snapshot.yaml here, nor one or two folders below)")
    summaries = [read_json(run / "summary.json") for run in found]
    by = _ranked_by(by, found, summaries)
    settings = [dict(flatten(_yaml(run / "snapshot.yaml"))) for run in found]
    keys = [k for k in {k: 0 for s in settings for k in s} if k not in NOT_COMPARED and len({s.get(k) for s in settings}) > 1]
    rows = []
    for run, summary, own in zip(found, summaries, settings, strict=True):
        value, base = (_value(summary, by, prefix) for prefix in ("", "base_"))
        rows.append({
            "run": run.relative_to(folder).as_posix(), "status": str(summary.get("status") or "unfinished"), "values": [own.get(k, "") for k in keys],
            "score": value, "base": base, "loss": summary.get("eval_loss"), "trainable": summary.get("trainable_parameters"),
            "seconds": summary.get("seconds"), "report": (run / "report.html").is_file(),
        })  # fmt: skip
    sign = 1 if by == "eval_loss" else -1
    rows.sort(key=lambda r: (not is_number(r["score"]), sign * r["score"] if is_number(r["score"]) else 0, r["loss"] if is_number(r["loss"]) else 1e9, r["run"]))
    return {"name": folder.resolve().name, "by": by, "label": LABELS.get(by, "Held-out loss"), "keys": keys, "rows": rows}


def _ranked_by(by: str | None, found: list[Path], summaries: list[dict[str, Any]]) -> str:
    measured = [k for k in METRICS if any(is_number((s.get("metrics") or {}).get(k)) for s in summaries)]
    if by is None:
        answered = next((rows for run in found if (rows := read_jsonl(run / "eval" / "tuned.jsonl"))), [])
        return main_metrics(answered)[0] if measured else "eval_loss"
    if by not in (*measured, "eval_loss"):
        raise UserError(f"by={by}: none of these runs measured it.{nearest(by, [*measured, 'eval_loss'])} There are: {', '.join([*measured, 'eval_loss'])}.")
    return by


def _value(summary: dict[str, Any], key: str, prefix: str) -> Any:
    return summary.get(prefix + key) if key == "eval_loss" else (summary.get(f"{prefix}metrics") or {}).get(key)


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(read_text(path) or "") or {}
    except yaml.YAMLError:
        return {}


def write(folder: Path, board: dict[str, Any]) -> list[Path]:
    """report.html and report.md of the folder."""
    wrote = []
    for name, text in (("report.html", render("leaderboard.html.j2", board=board, numbers=numbers)), ("report.md", markdown(board))):
        partial = folder / f"{name}.partial"
        partial.write_text(text, encoding="utf-8", newline="\n")
        os.replace(partial, folder / name)
        wrote.append(folder / name)
    return wrote


def markdown(board: dict[str, Any]) -> str:
    head = ["run", *board["keys"], "status", "base", board["label"], "loss", "trainable", "time"]
    lines = [f"# {board['name']}: {len(board['rows'])} runs, ranked by {board['label']}", "", _row(head), _row(["---"] * len(head))]
    for r in board["rows"]:
        run = f"[{cell(r['run'])}]({r['run'].replace(' ', '%20')}/report.html)" if r["report"] else cell(r["run"])
        lines.append(_row([run, *map(cell, r["values"]), cell(r["status"]), *figures(r)]))
    return "\n".join(lines) + "\n"


def figures(row: dict[str, Any]) -> list[str]:
    """base, score, loss, trainable parameters, time: as people read them."""
    return [numbers.metric(row["base"]), numbers.metric(row["score"]), numbers.metric(row["loss"]), numbers.count(row["trainable"]),
            numbers.duration(row["seconds"])]  # fmt: skip


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
