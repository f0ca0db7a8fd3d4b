"""Rows of the metric and plan tables that page, Markdown and terminal show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

from ..common.records import AnswerCounts, AnswerRecord, Difference, EvaluationSummary, MetricInfo, MetricValues, PlanReport, Summary
from ..config.keep import own_scores, split_name
from ..evaluation.metrics.defaults import default_metrics
from ..evaluation.resampling import is_noise
from . import numbers
from .numbers import is_number

T = TypeVar("T")

DEFAULT_INFO: dict[str, MetricInfo] = {
    score.name: {"label": score.label, "higher_is_better": score.higher_is_better, "top": score.top} for score in default_metrics().scores
}


class MetricRow(TypedDict):
    """A metric of base and tuned model.

    kind: good, bad or "" (a change that is within noise, or none). interval, p: of the change; "" where they are not known.
    bars: percent of the best score; None without one.
    """

    label: str
    name: str
    base: str
    tuned: str
    change: str
    kind: str
    interval: str
    p: str
    bars: list[float | None] | None


def answer_notes(summary: Summary | EvaluationSummary, kept: str | None = None) -> list[str]:
    """What stands next to the metrics: rows, references per row, rows left out, answers that reached the limit of new tokens, and how the
    intervals were made. kept: of this set of evaluation.keep.
    """
    source: Mapping[str, Any] = summary if kept is None else (summary.get("keep") or {}).get(kept) or {}
    counts: dict[str, AnswerCounts] = {name: c for name, c in (("base", source.get("base_answer_counts")), ("tuned", source.get("answer_counts"))) if c}
    if not counts:
        return []
    notes = [rows_note(list(counts.values())[-1])]
    truncated = {name: c["truncated"] for name, c in counts.items()}
    limit, longest = source.get("max_new_tokens"), source.get("longest_reference") or 0
    if any(truncated.values()):
        each = f"{truncated['tuned']}" if list(truncated) == ["tuned"] else ", ".join(f"{name} {n}" for name, n in truncated.items())
        notes.append(f"Answers cut off at {f'{limit} tokens' if limit else 'the limit'} (generation.max_new_tokens): {each}.")
    notes += metric_notes(of_set(summary.get("metric_info") or {}, kept))
    notes += interval_notes(of_set(summary.get("gains") or {}, kept))
    if limit and longest > limit:
        notes.append(f"The longest reference has {longest} tokens, more than generation.max_new_tokens={limit}; generation.max_new_tokens=auto fits it.")
    return notes


def metric_notes(info: Mapping[str, MetricInfo]) -> list[str]:
    """The notes of the metrics, and which of them have no value for some rows."""
    notes = [f"{one['label']}: {one['note']}." for one in info.values() if one.get("note")]
    return notes + [f"{one['label']}: no value for {one['missing']} rows." for one in info.values() if one.get("missing")]


def interval_notes(gaps: Mapping[str, Difference]) -> list[str]:
    """How the intervals were made."""
    if not gaps:
        return []
    most = max(gap["resamples"] for gap in gaps.values())
    fewer = [f"{name} {gap['resamples']}" for name, gap in gaps.items() if gap["resamples"] < most]
    also = f" ({', '.join(fewer)})" if fewer else ""
    return [f"95 % interval and p of the change: paired bootstrap over the rows, {most:,} resamples{also}. A change is within noise where the interval holds 0."]


def of_set(values: Mapping[str, T], kept: str | None) -> dict[str, T]:
    """The entries of the run's own data, or those of a set of evaluation.keep under the names of their scores."""
    names = {name: split_name(name) for name in values}
    if kept is None:
        return {name: value for name, value in values.items() if names[name] is None}
    return {found[1]: values[name] for name, found in names.items() if found and found[0] == kept}


def rows_note(counts: AnswerCounts) -> str:
    """Number of rows, references per row, rows left out."""
    references = counts["references_per_row"]
    left_out = f", {counts['left_out']} rows left out" if counts["left_out"] else ""
    return f"{counts['rows']} rows, {references:g} reference{'' if references == 1 else 's'} per row{left_out}."


class PlanTableRow(TypedDict):
    """A part of the model in the adapter plan. idle: nothing in it is trained."""

    part: str
    method: str
    adapted: str
    rate: str
    r: str
    scale: str
    trainable: str
    total: str
    share: str
    idle: bool


def info_of(name: str, recorded: Mapping[str, MetricInfo]) -> MetricInfo:
    """Label, direction and bar of a score, also of one source of a mix. recorded: `metric_info` of summary.json, which older runs do not have."""
    known = recorded.get(name) or DEFAULT_INFO.get(name)
    metric, _, source = name.partition("/")
    if known or not source:
        return known or {"label": name, "higher_is_better": name != "loss", "top": None}
    info = info_of(metric, recorded)
    return {"label": f"{'Held-out loss' if metric == 'loss' else info['label']}, {source}", "higher_is_better": info["higher_is_better"], "top": info["top"]}


def main_metrics(rows: Sequence[AnswerRecord], measured: Sequence[str]) -> Sequence[str]:
    """The two most telling metrics: CIDEr and ROUGE-L for captions (references of five words and more), exact match and token F1 for
    answers; the first two that were measured where these were not. Never those of a kept set.
    """
    measured = own_scores(measured)
    lengths = sorted(len(str(r).split()) for row in rows for r in (row.get("references") or ())[:1])
    usual = ("cider", "rouge_l") if lengths and lengths[len(lengths) // 2] >= 5 else ("exact_match", "token_f1")
    return usual if not measured or set(usual) & set(measured) else measured[:2]


def main_kept(measured: Sequence[str], kept: str) -> str:
    """The most telling score of a kept set: CIDEr or exact match, else the first that was measured on it; `measured` has one."""
    names = {found[1]: name for name in measured if (found := split_name(name)) and found[0] == kept}
    return next((names[score] for score in ("cider", "exact_match") if score in names), next(iter(names.values())))


def change_kind(base: object, tuned: object, higher_is_better: bool, gap: Difference | None = None) -> str:
    """good, bad, or "" where either is missing, both are equal as shown, or the difference is within noise."""
    if not is_number(base) or not is_number(tuned) or round(base, 3) == round(tuned, 3) or is_noise(gap):
        return ""
    return "good" if (tuned > base) == higher_is_better else "bad"


def metric_names(values: Sequence[Mapping[str, object]]) -> list[str]:
    """Names of the metrics in any of `values`, the default ones first, the others in their order."""
    names = {name: 0 for one in values for name in one}
    return [m for m in DEFAULT_INFO if m in names] + [m for m in names if m not in DEFAULT_INFO]


def metric_rows(summary: Summary | EvaluationSummary, kept: str | None = None) -> list[MetricRow]:
    """One row for each metric of either model, the held-out loss last; of a mix those over all sources, see `source_table`.

    kept: on this set of evaluation.keep.
    """
    base: MetricValues = of_set(summary.get("base_metrics") or {}, kept)
    tuned: MetricValues = of_set(summary.get("metrics") or {}, kept)
    gains, infos = of_set(summary.get("gains") or {}, kept), of_set(summary.get("metric_info") or {}, kept)
    losses = (summary.get("base_eval_loss"), summary.get("eval_loss")) if kept is None else (base.get("loss"), tuned.get("loss"))
    rows = []
    for name in metric_names([base, tuned]):
        if kept is not None and name == "loss" or "/" in name:
            continue
        info = info_of(name, infos)
        label = info["label"].removeprefix(f"{kept}: ")
        label = label if info["higher_is_better"] else f"{label} (lower is better)"
        rows.append(_row(label, name, base.get(name), tuned.get(name), info["top"], info["higher_is_better"], gains.get(name)))
    if any(map(is_number, losses)):
        rows.append(_row("Held-out loss (lower is better)", "eval_loss", *losses, None, False, gains.get("eval_loss" if kept is None else "loss")))
    return rows


def _row(label: str, name: str, base: object, tuned: object, top: float | None, higher_is_better: bool, gap: Difference | None) -> MetricRow:
    # a full bar is the best possible score, so an error rate has none
    bars = [100 * min(max(v / top, 0), 1) if is_number(v) else None for v in (base, tuned)] if top and higher_is_better else None
    return {
        "label": label, "name": name, "base": numbers.metric(base), "tuned": numbers.metric(tuned), "change": numbers.change(base, tuned),
        "kind": change_kind(base, tuned, higher_is_better, gap), "interval": numbers.interval(gap), "p": numbers.p_value(gap), "bars": bars,
    }  # fmt: skip


class SourceTable(TypedDict):
    """The sources of a mix side by side. rows: (label, name of the score or "", a cell for each source)."""

    sources: list[str]
    rows: list[tuple[str, str, list[str]]]


FACTS = {"weight": "Weight", "training_rows": "Training rows", "draws": "Draws an epoch", "rows": "Rows trained", "tokens": "Tokens with loss trained",
         "held_out": "Held-out rows"}  # fmt: skip


def source_table(summary: Summary | EvaluationSummary, short: bool = False) -> SourceTable | None:
    """What was trained and measured of each source, `base -> tuned` with the 95 % interval of the change; None without a mix. short: no more than fits on a screen."""
    base: MetricValues = of_set(summary.get("base_metrics") or {}, None)
    tuned: MetricValues = of_set(summary.get("metrics") or {}, None)
    gains = summary.get("gains") or {}
    names = [name for name in metric_names([base, tuned]) if "/" in name]
    facts = cast(Summary, summary).get("sources") or {}
    sources = list({**facts, **{name.partition("/")[2]: None for name in names}})
    if not sources:
        return None
    rows = []
    for key, label in FACTS.items():
        if any(facts[s].get(key) is not None for s in facts) and not (short and key in ("weight", "training_rows", "tokens")):
            rows.append((label, "", [numbers.plain(facts.get(s, {}).get(key)) if key == "weight" else numbers.count(facts.get(s, {}).get(key)) for s in sources]))
    metrics = list(dict.fromkeys(name.partition("/")[0] for name in names))
    shown = [m for m in metrics if m in (*main_metrics([], [m for m in metrics if m != "loss"]), "loss")] if short else metrics
    for metric in sorted(shown, key=lambda m: m == "loss"):
        info = info_of(metric, summary.get("metric_info") or {})
        label = "Held-out loss" if metric == "loss" else info["label"]
        cells = [_change(base.get(f"{metric}/{s}"), tuned.get(f"{metric}/{s}"), gains.get(f"{metric}/{s}")) for s in sources]
        rows.append((label if info["higher_is_better"] else f"{label} (lower is better)", metric, cells))
    return {"sources": sources, "rows": rows}


def _change(base: object, tuned: object, gap: Difference | None) -> str:
    """`0.310 -> 0.480 (+0.020 to +0.320)`: both models, and the interval of the change."""
    values = f"{numbers.metric(base)} \u2192 {numbers.metric(tuned)}" if is_number(base) else numbers.metric(tuned)
    return f"{values} ({numbers.interval(gap)})" if gap else values


def plan_rows(plan: PlanReport) -> list[PlanTableRow]:
    rows: list[PlanTableRow] = []
    for row in plan.get("rows") or ():
        scale = row.get("scale")
        rows.append({
            "part": str(row.get("part", "")), "method": str(row.get("method") or numbers.MISSING), "rate": numbers.plain(row.get("rate")), "adapted": f"{row.get('modules', 0)} of {row.get('linear', 0)}",
            "r": str(row.get("r") or numbers.MISSING), "scale": f"{scale:g}" if is_number(scale) else numbers.MISSING,
            "trainable": numbers.count(row.get("trainable")), "total": numbers.count(row.get("total")),
            "share": numbers.percent(row.get("trainable"), row.get("total")),
            "idle": not row.get("trainable"),
        })  # fmt: skip
    return rows


def expert_notes(plan: PlanReport) -> list[str]:
    """One line for the expert tensors of each name: their number, shape, parameters, and whether they are adapted; one for layers left out."""
    left = plan.get("unreachable") or []
    kinds = ", ".join(sorted({name.split(".")[-1] for name in left}))
    note = [f"{len(left)} linear layers ({kinds}) get no adapter: peft takes these names for this model's experts"] if left else []
    return note + [
        f"expert tensors {e['name']}: {e['tensors']} of {' x '.join(map(str, e['shape']))}, {numbers.count(e['total'])} parameters, "
        + (f"{e['adapted']} adapted" if e["adapted"] else "frozen")
        for e in plan.get("experts") or ()
    ]
