"""report.md: a run's figures and texts for places that show Markdown, made from the run directory's files alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ..common.files import read_json, read_jsonl, read_text
from ..common.records import AnswerRecord, Environment, PlanReport, Summary
from . import answers, numbers
from .answers import AnswerPair
from .html import write_text
from .lineage import lineage
from .run_files import flatten
from .run_page import RUN_FILES, run_date, run_status
from .tables import answer_notes, expert_notes, metric_rows, plan_rows, source_table

MAX_SAMPLES = 12  # held-out samples shown, see answers.select


def write_markdown(run_dir: Path) -> Path:
    """Write report.md into a run directory and return its path. Missing files are named in it."""
    return write_text(Path(run_dir) / "report.md", markdown(Path(run_dir)))


def markdown(run_dir: Path) -> str:
    summary, plan = cast(Summary, read_json(run_dir / "summary.json")), cast(PlanReport, read_json(run_dir / "lora_plan.json"))
    env = cast(Environment, read_json(run_dir / "env.json"))
    base, tuned = (cast("list[AnswerRecord]", read_jsonl(run_dir / "eval" / f"{name}.jsonl")) for name in ("base", "tuned"))
    words = " ".join((read_text(run_dir / "overrides.txt") or "").split())
    parts = [
        f"# {cell(summary.get('name') or run_dir.resolve().name)}",
        f"{run_status(run_dir, summary)}, {run_date(run_dir, flatten(env))}" + (f": {cell(summary['reason'])}" if summary.get("reason") else ""),
        fenced(f"mmft {words}".strip()),
    ]
    absent = [f"`{name}` ({what})" for name, what in RUN_FILES.items() if not (run_dir / name).is_file()]
    parts += [f"Not in this run directory: {', '.join(absent)}."] if absent else []
    parts += ["## Loss", "![Training and held-out loss](loss_curve.png)"] if (run_dir / "loss_curve.png").is_file() else []
    for kept in (None, *(summary.get("keep") or {})):
        if metrics := metric_rows(summary, kept):
            head = ("metric", "base", "tuned", "change", "95 % interval", "p")
            parts += ["## Base against tuned" if kept is None else f"## Kept: {cell(kept)}, base against tuned"]
            parts += [table(head, [[m["label"], m["base"], m["tuned"], m["change"], m["interval"], m["p"]] for m in metrics])]
            parts += answer_notes(summary, kept)
    by_source = source_table(summary)
    if by_source is not None:
        parts += ["## By source", table(("", *map(cell, by_source["sources"])), [[label, *cells] for label, _, cells in by_source["rows"]])]
    rows = plan_rows(plan)
    if rows:
        columns = ("part", "method", "layers adapted", "r", "scale", "learning rate", "trainable", "parameters")
        parts += ["## Adapter plan", table(columns, [[r["part"], r["method"], r["adapted"], r["r"], r["scale"], r["rate"], r["trainable"], r["total"]] for r in rows])]
        parts += [*expert_notes(plan), *map(cell, plan.get("notes") or ())]
    if ancestors := lineage(run_dir):
        names = ("run", "what it is", "to", "steps", "held-out loss", "sha256")
        parts += ["## Builds on", table(names, [[a["name"], a["what"], a["of"], a["steps"], a["loss"], a["sha256"]] for a in ancestors])]
    model = env.get("model") or {}
    facts = {
        "steps": summary.get("steps"), "time": numbers.duration(summary.get("seconds")), "peak memory": numbers.memory(summary.get("peak_memory_mb")),
        "effective batch": summary.get("effective_batch_size"), "seed": summary.get("seed"), "data fingerprint": summary.get("data_fingerprint"),
        "base model": f"{model.get('path') or ''} {model.get('revision') or ''}".strip(),
    }  # fmt: skip
    parts += ["## Run", table(("", ""), [[k, str(v)] for k, v in facts.items() if v not in (None, "", numbers.MISSING)])]
    selected = answers.select(answers.pair(base, tuned), MAX_SAMPLES, answers.ranking_of(tuned or base, summary.get("metric_info") or {}))
    if selected:
        parts += ["## Held-out samples", table(("sample", "prompt", "reference", "base", "tuned"), [_sample(p) for p in selected])]
    snapshot = read_text(run_dir / "snapshot.yaml")
    parts += ["## Configuration", fenced(snapshot.strip(), "yaml")] if snapshot else []
    return "\n\n".join(parts) + "\n"


def _sample(pair: AnswerPair) -> list[str]:
    row = pair.row
    texts = [str(answer.get("prediction") or "") if answer else numbers.MISSING for answer in (pair.base, pair.tuned)]
    return [str(row.get("id", pair.index)), str(row.get("prompt") or ""), str((row.get("references") or [""])[0]), *texts]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the cells are escaped, the head is not."""
    return "\n".join([table_line(head), table_line(["---"] * len(head)), *(table_line([cell(c) for c in row]) for row in rows)])


def table_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def cell(value: object) -> str:
    """Text for a table cell: one line, with the characters escaped that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def fenced(value: str, kind: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in its text."""
    longest = max((len(run) for run in re.findall(r"`+", value)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{value}\n{fence}"
