"""report.md: a run directory's figures and texts for places that show Markdown, built from the directory's files alone."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..common.files import read_json, read_jsonl, read_text
from . import comparison, numbers
from .page import PARTS, date_of, flatten, metric_rows, plan_rows

SAMPLES = 12  # held-out samples shown, see comparison.select


def write_markdown(run_dir: Path) -> Path:
    """Write report.md into a run directory and return its path. Missing files are named."""
    path = Path(run_dir) / "report.md"
    partial = path.with_name("report.md.partial")
    partial.write_text(text(Path(run_dir)), encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def text(run_dir: Path) -> str:
    summary, plan, env = (read_json(run_dir / f"{name}.json") for name in ("summary", "lora_plan", "env"))
    base, tuned = (read_jsonl(run_dir / "eval" / f"{name}.jsonl") for name in ("base", "tuned"))
    status = str(summary.get("status") or ("finished" if (run_dir / "DONE").exists() else "unfinished"))
    words = " ".join((read_text(run_dir / "overrides.txt") or "").split())
    parts = [
        f"# {cell(summary.get('name') or run_dir.resolve().name)}",
        f"{status}, {date_of(run_dir, flatten(env))}" + (f": {cell(summary['reason'])}" if summary.get("reason") else ""),
        fenced(f"mmft {words}".strip()),
    ]
    absent = [f"`{name}` ({what})" for name, what in PARTS.items() if not (run_dir / name).is_file()]
    parts += [f"Not in this run directory: {', '.join(absent)}."] if absent else []
    parts += ["## Loss", "![Training and held-out loss](loss_curve.png)"] if (run_dir / "loss_curve.png").is_file() else []
    metrics = metric_rows(summary)
    if metrics:
        parts += ["## Base against tuned", table(("metric", "base", "tuned", "change"), [[m["label"], m["base"], m["tuned"], m["change"]] for m in metrics])]
    rows = plan_rows(plan)
    if rows:
        keys = ("part", "adapted", "r", "scale", "trainable", "total")
        parts += ["## Adapter plan", table(("part", "layers adapted", "r", "scale", "trainable", "parameters"), [[r[k] for k in keys] for r in rows])]
    facts = {
        "steps": summary.get("steps"), "time": numbers.duration(summary.get("seconds")), "peak memory": numbers.memory(summary.get("peak_memory_mb")),
        "effective batch": summary.get("effective_batch_size"), "seed": summary.get("seed"), "data fingerprint": summary.get("data_fingerprint"),
        "base model": " ".join(str((env.get("model") or {}).get(k) or "") for k in ("path", "revision")).strip(),
    }  # fmt: skip
    parts += ["## Run", table(("", ""), [[k, str(v)] for k, v in facts.items() if v not in (None, "", numbers.MISSING)])]
    shown = comparison.select(comparison.pair(base, tuned), SAMPLES)
    if shown:
        parts += ["## Held-out samples", table(("sample", "prompt", "reference", "base", "tuned"), [sample(p) for p in shown])]
    snapshot = read_text(run_dir / "snapshot.yaml")
    parts += ["## Configuration", fenced(snapshot.strip(), "yaml")] if snapshot else []
    return "\n\n".join(parts) + "\n"


def sample(pair: dict[str, Any]) -> list[str]:
    row = pair["row"]
    said = [str(pair[side].get("prediction") or "") if pair[side] else numbers.MISSING for side in ("base", "tuned")]
    return [str(row.get("id", pair["index"])), str(row.get("prompt") or ""), str((row.get("references") or [""])[0]), *said]


def table(head: tuple[str, ...], rows: list[list[str]]) -> str:
    lines = [list(head), ["---"] * len(head), *([cell(c) for c in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cell(value: Any) -> str:
    """Text in a table: on one line, what Markdown or HTML would read as its own escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def fenced(value: str, kind: str = "") -> str:
    """A code block with more backticks than its text holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{value}\n{fence}"
