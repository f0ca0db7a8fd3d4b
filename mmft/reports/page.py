"""report.html: a run directory as one page that opens offline, built from the directory's files alone."""

from __future__ import annotations

import base64
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from ..common.files import read_json, read_text
from ..config.library_keys import METRICS
from . import comparison, numbers, pictures
from .curve import write_curve
from .files import is_number, read_rows

SAMPLES = 24  # held-out samples shown, see comparison.select
PICTURES_A_SAMPLE = 4
PICTURE_SIDE = 300  # pixels; 24 JPEGs of this size stay below half a megabyte
WATCHED_SAMPLES, WATCHED_STEPS = 12, 12  # samples while training

# What a finished run holds, and what the page shows of it.
PARTS = {
    "summary.json": "summary",
    "metrics.jsonl": "loss curve",
    "eval/tuned.jsonl": "texts of the tuned model",
    "eval/base.jsonl": "texts of the base model",
    "lora_plan.json": "adapter plan",
    "snapshot.yaml": "configuration",
    "overrides.txt": "command",
    "env.json": "environment",
}


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory and return its path. Missing files are named on the page.

    loss_curve.png is drawn first where metrics.jsonl is there and the picture is not.
    """
    run_dir = Path(run_dir)
    text = render("page.html.j2", **view(run_dir))
    path = run_dir / "report.html"
    partial = path.with_name("report.html.partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)
    return path


def render(template: str, **values: Any) -> str:
    """A template of this folder with the pages' style sheet. Every value is escaped; one the template lacks is an error."""
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(css=(here / "page.css").read_text(encoding="utf-8"), **values)


def view(run_dir: Path) -> dict[str, Any]:
    """Everything the template shows, as plain values; texts unescaped (the template escapes all of them)."""
    summary, plan = read_json(run_dir / "summary.json"), read_json(run_dir / "lora_plan.json")
    base, tuned = (read_rows(run_dir / "eval" / f"{name}.jsonl", run_dir) for name in ("base", "tuned"))
    shown = [sample(p) for p in comparison.select(comparison.pair(base, tuned), SAMPLES)]
    prompts = {s["prompt"] for s in shown}
    env = flatten(read_json(run_dir / "env.json"))
    absent = [(name, what) for name, what in PARTS.items() if not (run_dir / name).is_file()]
    if plan.get("method") == "full" or summary.get("method") == "full":
        absent = [a for a in absent if a[0] != "lora_plan.json"]
    return {
        "name": str(summary.get("name") or run_dir.resolve().name),
        "status": str(summary.get("status") or ("finished" if (run_dir / "DONE").exists() else "unfinished")),
        "date": date_of(run_dir, env),
        "overrides": " ".join((read_text(run_dir / "overrides.txt") or "").split()),
        "absent": absent,
        "cards": cards(summary, tuned or base),
        "curve": curve_uri(run_dir),
        "metrics": metric_rows(summary),
        "measured": len(tuned or base),
        "plan": plan_rows(plan),
        "plan_total": plan,
        "config": read_text(run_dir / "snapshot.yaml"),
        "env": env,
        "samples": shown,
        "prompt": prompts.pop() if len(prompts) == 1 and len(shown) > 1 else "",  # shown once when all share it
        "watched": watched(read_rows(run_dir / "eval" / "samples.jsonl", run_dir)),
        "numbers": numbers,
    }


def date_of(run_dir: Path, env: list[tuple[str, str]]) -> str:
    """When the run was made: env.json's own word, or the directory's name, or the directory's age."""
    for key, value in env:
        if key in ("created", "started", "date", "time"):
            return value
    named = re.match(r"(\d{4}-?\d\d-?\d\d)_(\d\d)-?(\d\d)-?(\d\d)", run_dir.resolve().name)
    if named:
        return f"{named[1]} {named[2]}:{named[3]}:{named[4]}"
    return datetime.fromtimestamp(run_dir.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")


def main_metrics(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    """The two metrics that matter most: for captions (references of five words and more) CIDEr and ROUGE-L."""
    lengths = sorted(len(str(r).split()) for row in rows for r in (row.get("references") or ())[:1])
    return ("cider", "rouge_l") if lengths and lengths[len(lengths) // 2] >= 5 else ("exact_match", "token_f1")


def cards(summary: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    base, tuned = summary.get("base_metrics") or {}, summary.get("metrics") or {}
    shown = []

    def against(label: str, a: Any, b: Any, lower_is_better: bool = False) -> None:
        if is_number(a) or is_number(b):
            better = "" if not (is_number(a) and is_number(b)) or a == b else "good" if (b > a) != lower_is_better else "bad"
            note = "base \u2192 tuned" if is_number(a) else "tuned"
            shown.append({"label": label, "base": numbers.metric(a) if is_number(a) else "", "value": numbers.metric(b), "note": note, "kind": better})

    for name in main_metrics(rows):
        against(LABELS[name], base.get(name), tuned.get(name))
    against("Held-out loss", summary.get("base_eval_loss"), summary.get("eval_loss"), lower_is_better=True)
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    speed = summary.get("samples_per_second")
    for label, value, note in (
        ("Trainable", numbers.count(trainable), f"{numbers.percent(trainable, total)} of {numbers.count(total)}" if is_number(total) else ""),
        ("Time", numbers.duration(summary.get("seconds")), f"{speed:.1f} samples/s" if is_number(speed) else ""),
        ("Peak memory", numbers.memory(summary.get("peak_memory_mb")), ""),
    ):
        if value != numbers.MISSING:
            shown.append({"label": label, "base": "", "value": value, "note": note, "kind": ""})
    return shown


LABELS = {
    "exact_match": "Exact match",
    "exact_match_normalized": "Exact match, normalised",
    "contains": "Contains a reference",
    "token_f1": "Token F1",
    "vqa_accuracy": "VQA accuracy",
    "bleu4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
}


def metric_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a metric that either model has, the known ones first, the held-out loss last."""
    base, tuned = summary.get("base_metrics") or {}, summary.get("metrics") or {}
    names = [m for m in METRICS if m in base or m in tuned] + sorted((set(base) | set(tuned)) - set(METRICS))
    table: list[tuple[str, str, Any, Any, float | None, bool]]
    table = [(LABELS.get(n) or n, n, base.get(n), tuned.get(n), 10.0 if n == "cider" else 1.0, True) for n in names]
    if is_number(summary.get("eval_loss")) or is_number(summary.get("base_eval_loss")):
        table.append(("Held-out loss (lower is better)", "eval_loss", summary.get("base_eval_loss"), summary.get("eval_loss"), None, False))
    rows = []
    for label, name, a, b, top, higher in table:
        both = is_number(a) and is_number(b)
        kind = "" if not both or round(a, 3) == round(b, 3) else "good" if (b > a) == higher else "bad"
        bars = [100 * min(max(v / top, 0), 1) if top and is_number(v) else None for v in (a, b)]
        rows.append({"label": label, "name": name, "base": numbers.metric(a), "tuned": numbers.metric(b),
                     "change": numbers.change(a, b), "kind": kind, "bars": bars if top else None})  # fmt: skip
    return rows


def plan_rows(plan: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in plan.get("rows") or ():
        scale = row.get("scale")
        rows.append({
            "part": str(row.get("part", "")), "adapted": f"{row.get('modules', 0)} of {row.get('linear', 0)}",
            "r": str(row.get("r") or numbers.MISSING), "scale": f"{scale:g}" if is_number(scale) else numbers.MISSING,
            "trainable": numbers.count(row.get("trainable")), "total": numbers.count(row.get("total")),
            "share": numbers.percent(row.get("trainable"), row.get("total")),
            "idle": not row.get("trainable"),
        })  # fmt: skip
    return rows


def sample(pair: dict[str, Any]) -> dict[str, Any]:
    row = pair["row"]
    references = [str(r) for r in row.get("references") or ()]
    texts = []
    for name in ("base", "tuned"):
        if pair[name] is not None:
            text = str(pair[name].get("prediction") or "")
            close = comparison.nearest(text, references)
            texts.append({"name": name, "kind": name, "empty": not text.strip(), "verdict": comparison.verdict(pair[name]),
                          "pieces": comparison.difference(text, close)})  # fmt: skip
    if texts and references:  # the one the last text is held against comes first, the others fold away
        references = [close, *(r for r in references if r != close)]
    return {"id": str(row.get("id", pair["index"])), "why": pair["why"], "prompt": str(row.get("prompt") or ""),
            "references": references, "texts": texts, **shown_pictures(row, PICTURE_SIDE, PICTURES_A_SAMPLE)}  # fmt: skip


def shown_pictures(row: dict[str, Any], side: int, limit: int) -> dict[str, Any]:
    """{"pictures": [{"name", "uri" (None: cannot be opened), "small"}], "more": pictures left out}."""
    names = [str(i) for i in row.get("images") or ()]
    opened = pictures.row_pictures({**row, "images": names[:limit]}, side)
    return {
        "pictures": [
            {"name": name, "uri": small and pictures.data_uri(small), "small": small is not None and max(small.size) < pictures.SMALL}
            for name, small in zip(names[:limit], opened, strict=True)
        ],
        "more": max(0, len(names) - limit),
    }


def watched(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Samples while training: each sample once, with its text at up to WATCHED_STEPS steps (first and last among them)."""
    if len(entries) > WATCHED_STEPS:
        entries = [entries[round(k * (len(entries) - 1) / (WATCHED_STEPS - 1))] for k in range(WATCHED_STEPS)]
    found: dict[Any, dict[str, Any]] = {}
    for entry in entries:
        for place, row in enumerate(entry.get("samples") or ()):
            one = found.setdefault(row.get("index", place), {"row": row, "steps": []})
            one["steps"].append({"step": entry.get("step"), "text": str(row.get("prediction") or ""), "verdict": comparison.verdict(row)})
    return [
        {"id": str(one["row"].get("id", index)), "prompt": str(one["row"].get("prompt") or ""), "steps": one["steps"],
         "references": [str(r) for r in one["row"].get("references") or ()], **shown_pictures(one["row"], 120, 1)}
        for index, one in list(found.items())[:WATCHED_SAMPLES]
    ]  # fmt: skip


def curve_uri(run_dir: Path) -> str | None:
    path = run_dir / "loss_curve.png"
    if not path.is_file() and write_curve(run_dir) is None:
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")


def flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) rows."""
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(prefix, "" if value is None else str(value))] if prefix else []
