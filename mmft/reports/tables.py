"""Rows of the metric and plan tables that page, Markdown and terminal show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from ..common.records import AnswerCounts, AnswerRecord, EvaluationSummary, MetricInfo, MetricValues, PlanReport, Summary
from ..evaluation.metrics.defaults import default_metrics
from . import numbers
from .numbers import is_number

DEFAULT_INFO: dict[str, MetricInfo] = {
    score.name: {"label": score.label, "higher_is_better": score.higher_is_better, "top": score.top} for score in default_metrics().scores
}


class MetricRow(TypedDict):
    """A metric of base and tuned model. kind: good, bad or "" (the change). bars: percent of the best score; None without one."""

    label: str
    name: str
    base: str
    tuned: str
    change: str
    kind: str
    bars: list[float | None] | None


def answer_notes(summary: Summary | EvaluationSummary) -> list[str]:
    """What stands next to the metrics: rows, references per row, rows left out, answers that reached the limit of new tokens."""
    counts = {name: c for name, c in (("base", summary.get("base_answer_counts")), ("tuned", summary.get("answer_counts"))) if c}
    if not counts:
        return []
    notes = [rows_note(list(counts.values())[-1])]
    truncated = {name: c["truncated"] for name, c in counts.items()}
    limit, longest = summary.get("max_new_tokens"), summary.get("longest_reference") or 0
    if any(truncated.values()):
        each = f"{truncated['tuned']}" if list(truncated) == ["tuned"] else ", ".join(f"{name} {n}" for name, n in truncated.items())
        notes.append(f"Answers cut off at {f'{limit} tokens' if limit else 'the limit'} (generation.max_new_tokens): {each}.")
    notes += metric_notes(summary.get("metric_info") or {})
    if limit and longest > limit:
        notes.append(f"The longest reference has {longest} tokens, more than generation.max_new_tokens={limit}; generation.max_new_tokens=auto fits it.")
    return notes


def metric_notes(info: Mapping[str, MetricInfo]) -> list[str]:
    """The notes of the metrics, and which of them have no value for some rows."""
    notes = [f"{one['label']}: {one['note']}." for one in info.values() if one.get("note")]
    return notes + [f"{one['label']}: no value for {one['missing']} rows." for one in info.values() if one.get("missing")]


def rows_note(counts: AnswerCounts) -> str:
    """Number of rows, references per row, rows left out."""
    references = counts["references_per_row"]
    left_out = f", {counts['left_out']} rows left out" if counts["left_out"] else ""
    return f"{counts['rows']} rows, {references:g} reference{'' if references == 1 else 's'} per row{left_out}."


class PlanTableRow(TypedDict):
    """A part of the model in the adapter plan. idle: nothing in it is trained."""

    part: str
    adapted: str
    r: str
    scale: str
    trainable: str
    total: str
    share: str
    idle: bool


def info_of(name: str, recorded: Mapping[str, MetricInfo]) -> MetricInfo:
    """Label, direction and bar of a score. recorded: `metric_info` of summary.json, which older runs do not have."""
    return recorded.get(name) or DEFAULT_INFO.get(name) or {"label": name, "higher_is_better": True, "top": None}


def main_metrics(rows: Sequence[AnswerRecord], measured: Sequence[str]) -> Sequence[str]:
    """The two most telling metrics: CIDEr and ROUGE-L for captions (references of five words and more), exact match and token F1 for
    answers; the first two that were measured where these were not.
    """
    lengths = sorted(len(str(r).split()) for row in rows for r in (row.get("references") or ())[:1])
    usual = ("cider", "rouge_l") if lengths and lengths[len(lengths) // 2] >= 5 else ("exact_match", "token_f1")
    return usual if not measured or set(usual) & set(measured) else measured[:2]


def change_kind(base: object, tuned: object, higher_is_better: bool) -> str:
    """good, bad, or "" where either is missing or both are equal as shown."""
    if not is_number(base) or not is_number(tuned) or round(base, 3) == round(tuned, 3):
        return ""
    return "good" if (tuned > base) == higher_is_better else "bad"


def metric_names(values: Sequence[Mapping[str, object]]) -> list[str]:
    """Names of the metrics in any of `values`, the default ones first, the others in their order."""
    names = {name: 0 for one in values for name in one}
    return [m for m in DEFAULT_INFO if m in names] + [m for m in names if m not in DEFAULT_INFO]


def metric_rows(summary: Summary | EvaluationSummary) -> list[MetricRow]:
    """One row for each metric of either model, the held-out loss last."""
    base: MetricValues = summary.get("base_metrics") or {}
    tuned: MetricValues = summary.get("metrics") or {}
    rows = []
    for name in metric_names([base, tuned]):
        info = info_of(name, summary.get("metric_info") or {})
        label = info["label"] if info["higher_is_better"] else f"{info['label']} (lower is better)"
        rows.append(_row(label, name, base.get(name), tuned.get(name), info["top"], info["higher_is_better"]))
    losses = summary.get("base_eval_loss"), summary.get("eval_loss")
    if any(map(is_number, losses)):
        rows.append(_row("Held-out loss (lower is better)", "eval_loss", *losses, None, False))
    return rows


def _row(label: str, name: str, base: object, tuned: object, top: float | None, higher_is_better: bool) -> MetricRow:
    bars = [100 * min(max(v / top, 0), 1) if is_number(v) else None for v in (base, tuned)] if top else None
    return {
        "label": label, "name": name, "base": numbers.metric(base), "tuned": numbers.metric(tuned), "change": numbers.change(base, tuned),
        "kind": change_kind(base, tuned, higher_is_better), "bars": bars,
    }  # fmt: skip


def plan_rows(plan: PlanReport) -> list[PlanTableRow]:
    rows: list[PlanTableRow] = []
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


def expert_notes(plan: PlanReport) -> list[str]:
    """One line for the expert tensors of each name: their number, shape, parameters, and whether they are adapted."""
    return [
        f"expert tensors {e['name']}: {e['tensors']} of {' x '.join(map(str, e['shape']))}, {numbers.count(e['total'])} parameters, "
        + (f"{e['adapted']} adapted" if e["adapted"] else "frozen")
        for e in plan.get("experts") or ()
    ]
