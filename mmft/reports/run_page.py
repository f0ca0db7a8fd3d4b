"""report.html: a run directory as one page, made from the directory's files alone."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict, cast

from ..common.files import read_json, read_text
from ..common.records import AnswerRecord, PlanReport, SamplesEntry, Summary
from ..evaluation.resampling import is_noise
from . import answers, numbers
from .answers import AnswerPair, Piece, Verdict
from .confusion import confusion_table
from .html import render, write_text
from .lineage import lineage
from .loss_curve import write_curve
from .numbers import is_number
from .pictures import ShownPictures, boxes_of, shown_pictures
from .reliability import chance, diagrams
from .run_files import flatten, read_answers, read_samples
from .tables import (
    answer_notes,
    change_kind,
    expert_notes,
    info_of,
    main_kept,
    main_metrics,
    metric_names,
    metric_rows,
    of_set,
    plan_rows,
    source_table,
)

MAX_SAMPLES = 24  # held-out samples shown, see answers.select
PICTURES_PER_SAMPLE = 4
PICTURE_SIDE = 300  # pixels; 24 JPEGs of this size stay below half a megabyte
MAX_TRAINING_SAMPLES, MAX_TRAINING_STEPS = 12, 12  # of the samples answered during training

# The files of a finished run and what the page shows of them.
RUN_FILES = {
    "summary.json": "summary",
    "metrics.jsonl": "loss curve",
    "eval/tuned.jsonl": "texts of the tuned model",
    "eval/base.jsonl": "texts of the base model",
    "lora_plan.json": "adapter plan",
    "snapshot.yaml": "configuration",
    "overrides.txt": "command",
    "env.json": "environment",
}


class Card(TypedDict):
    """A figure at the top of the page. base: the base model's value or "". kind: good, bad or "" (the change)."""

    label: str
    base: str
    value: str
    note: str
    kind: str


class ShownAnswer(TypedDict):
    """One model's answer in a sample's card. kind: base, tuned or other (its colour). chance: of a chosen answer."""

    name: str
    kind: str
    empty: bool
    chance: str
    verdict: Verdict
    pieces: list[Piece]


class SampleCard(ShownPictures):
    """A held-out row with the answers to it. heading: of the group it belongs to, "" for none."""

    id: str
    heading: str
    prompt: str
    references: list[str]
    texts: list[ShownAnswer]


class TrainingAnswer(TypedDict):
    step: int | None
    text: str
    verdict: Verdict


class TrainingSample(ShownPictures):
    """A row answered several times during training."""

    id: str
    prompt: str
    references: list[str]
    steps: list[TrainingAnswer]


def write_report(run_dir: Path) -> Path:
    """Write report.html into a run directory and return its path. Missing files are named on the page.

    loss_curve.png is drawn first where metrics.jsonl exists and the picture does not.
    """
    run_dir = Path(run_dir)
    return write_text(run_dir / "report.html", render("run.html.j2", **view(run_dir)))


def view(run_dir: Path) -> dict[str, Any]:
    """The values of the template; texts unescaped (the template escapes all of them)."""
    summary, plan = cast(Summary, read_json(run_dir / "summary.json")), cast(PlanReport, read_json(run_dir / "lora_plan.json"))
    base, tuned = (read_answers(run_dir / "eval" / f"{name}.jsonl", run_dir) for name in ("base", "tuned"))
    ranking = answers.ranking_of(tuned or base, summary.get("metric_info") or {})
    samples = [sample_card(p) for p in answers.select(answers.pair(base, tuned), MAX_SAMPLES, ranking)]
    prompts = {s["prompt"] for s in samples}
    env = flatten(read_json(run_dir / "env.json"))
    absent = [(name, what) for name, what in RUN_FILES.items() if not (run_dir / name).is_file()]
    if plan.get("method") == "full" or summary.get("method") == "full":
        absent = [a for a in absent if a[0] != "lora_plan.json"]
    return {
        "name": str(summary.get("name") or run_dir.resolve().name),
        "status": run_status(run_dir, summary),
        "date": run_date(run_dir, env),
        "overrides": " ".join((read_text(run_dir / "overrides.txt") or "").split()),
        "absent": absent,
        "cards": cards(summary, tuned or base),
        "curve": curve_uri(run_dir),
        "figures": [
            {"title": f"Kept: {kept}, base against tuned" if kept else "Base against tuned", "metrics": rows, "notes": answer_notes(summary, kept)}
            for kept in (None, *(summary.get("keep") or {})) if (rows := metric_rows(summary, kept))
        ],
        "by_source": source_table(summary),
        "measured": len(tuned or base),
        "plan": plan_rows(plan),
        "plan_total": plan,
        "experts": expert_notes(plan),
        "ancestors": lineage(run_dir),
        "config": read_text(run_dir / "snapshot.yaml"),
        "env": env,
        "confusion": confusion_table(summary.get("confusion"), tuned),
        "diagrams": diagrams([("base", base), ("tuned", tuned)]),
        "samples": samples,
        "ranking": ranking.label,
        "prompt": prompts.pop() if len(prompts) == 1 and len(samples) > 1 else "",  # shown once when all samples share it
        "training_samples": training_samples(read_samples(run_dir)),
        "numbers": numbers,
    }


def run_status(run_dir: Path, summary: Summary) -> str:
    return str(summary.get("status") or ("finished" if (run_dir / "DONE").exists() else "unfinished"))


def run_date(run_dir: Path, env: Sequence[tuple[str, str]]) -> str:
    """When the run was made: from env.json, else from the directory's name, else the directory's time of change."""
    for key, value in env:
        if key in ("created", "started", "date", "time"):
            return value
    named = re.match(r"(\d{4}-?\d\d-?\d\d)_(\d\d)-?(\d\d)-?(\d\d)", run_dir.resolve().name)
    if named:
        return f"{named[1]} {named[2]}:{named[3]}:{named[4]}"
    return datetime.fromtimestamp(run_dir.stat().st_mtime).strftime("%Y-%m-%d %H:%M:%S")


def cards(summary: Summary, rows: Sequence[AnswerRecord]) -> list[Card]:
    """The figures at the top: the two main metrics, loss, size, time, memory; absent ones are left out."""
    base, tuned = summary.get("base_metrics") or {}, summary.get("metrics") or {}
    result: list[Card] = []

    def compare(name: str, label: str, a: object, b: object, lower_is_better: bool = False) -> None:
        if is_number(a) or is_number(b):
            gap = (summary.get("gains") or {}).get(name)
            kind = change_kind(a, b, not lower_is_better, gap)
            note = "base \u2192 tuned" if is_number(a) else "tuned"
            note += ", within noise" if is_noise(gap) else ""
            result.append({"label": label, "base": numbers.metric(a) if is_number(a) else "", "value": numbers.metric(b), "note": note, "kind": kind})

    for name in main_metrics(rows, metric_names([base, tuned])):
        info = info_of(name, summary.get("metric_info") or {})
        compare(name, info["label"], base.get(name), tuned.get(name), not info["higher_is_better"])
    compare("eval_loss", "Held-out loss", summary.get("base_eval_loss"), summary.get("eval_loss"), lower_is_better=True)
    for kept in summary.get("keep") or {}:
        if not of_set(tuned or base, kept):
            continue
        name = main_kept(list(tuned or base), kept)
        info = info_of(name, summary.get("metric_info") or {})
        compare(name, f"Kept, {info['label']}", base.get(name), tuned.get(name), not info["higher_is_better"])
    trainable, total = summary.get("trainable_parameters"), summary.get("total_parameters")
    speed = summary.get("samples_per_second")
    for label, value, note in (
        ("Trainable", numbers.count(trainable), f"{numbers.percent(trainable, total)} of {numbers.count(total)}" if is_number(total) else ""),
        ("Time", numbers.duration(summary.get("seconds")), f"{speed:.1f} samples/s" if is_number(speed) else ""),
        ("Peak memory", numbers.memory(summary.get("peak_memory_mb")), ""),
    ):
        if value != numbers.MISSING:
            result.append({"label": label, "base": "", "value": value, "note": note, "kind": ""})
    return result


HEADINGS = {"largest gain": "Largest gains", "even spread": "An even spread of the rest", "worst answer": "Worst answers", "": ""}


def sample_card(pair: AnswerPair) -> SampleCard:
    row = pair.row
    references = [str(r) for r in row.get("references") or ()]
    texts: list[ShownAnswer] = []
    nearest = ""
    for name, answer in pair.answers:
        text = str(answer.get("prediction") or "")
        nearest = answers.nearest_reference(text, references)
        texts.append({"name": name, "kind": name, "empty": not text.strip(), "chance": chance(answer), "verdict": answers.verdict(answer),
                      "pieces": answers.difference(text, nearest)})  # fmt: skip
    if texts and references:  # the reference that the last text is compared with comes first; the others are folded
        references = [nearest, *(r for r in references if r != nearest)]
    return {"id": str(row.get("id", pair.index)), "heading": HEADINGS[pair.reason], "prompt": str(row.get("prompt") or ""),
            "references": references, "texts": texts, **shown_pictures(row, PICTURE_SIDE, PICTURES_PER_SAMPLE, [boxes_of(name, name, answer) for name, answer in pair.answers])}  # fmt: skip


def training_samples(entries: Sequence[SamplesEntry]) -> list[TrainingSample]:
    """Each sample once, with its answers at up to MAX_TRAINING_STEPS steps (the first and the last among them)."""
    if len(entries) > MAX_TRAINING_STEPS:
        entries = [entries[round(k * (len(entries) - 1) / (MAX_TRAINING_STEPS - 1))] for k in range(MAX_TRAINING_STEPS)]
    rows: dict[int, AnswerRecord] = {}
    steps: dict[int, list[TrainingAnswer]] = {}
    for entry in entries:
        for place, row in enumerate(entry.get("samples") or ()):
            index = row.get("index", place)
            rows.setdefault(index, row)
            steps.setdefault(index, []).append({"step": entry.get("step"), "text": str(row.get("prediction") or ""), "verdict": answers.verdict(row)})
    return [
        {"id": str(row.get("id", index)), "prompt": str(row.get("prompt") or ""), "steps": steps[index],
         "references": [str(r) for r in row.get("references") or ()], **shown_pictures(row, 120, 1)}
        for index, row in list(rows.items())[:MAX_TRAINING_SAMPLES]
    ]  # fmt: skip


def curve_uri(run_dir: Path) -> str | None:
    """loss_curve.png as a `data:` address; None without any loss."""
    path = run_dir / "loss_curve.png"
    if not path.is_file() and write_curve(run_dir) is None:
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
