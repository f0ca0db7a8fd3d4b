"""The page of `mmft evaluate` (base and tuned) and of `mmft compare` (any models): answers side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

from ..common.records import AnswerRecord, Difference, EvaluationSummary, MetricInfo, MetricValues
from ..evaluation.token_limit import count_answers
from . import answers, numbers
from .confusion import ConfusionTable, confusion_table
from .html import render
from .numbers import is_number
from .pictures import boxes_of, shown_pictures
from .reliability import chance, diagrams
from .run_page import HEADINGS, MAX_SAMPLES, PICTURE_SIDE, PICTURES_PER_SAMPLE, SampleCard, ShownAnswer
from .tables import PlanTableRow, answer_notes, change_kind, info_of, interval_notes, metric_names, metric_notes, rows_note


@dataclass
class Side:
    """One model's answers.

    kind: base, tuned or other (its colour). rows: as in eval/*.jsonl, the same samples for every side. figures: metrics
    over the rows, and eval_loss where it was measured. info: label and direction of the metrics. gains: differences from the first
    side, on the rows of both.
    """

    label: str
    kind: str
    about: str
    rows: list[AnswerRecord]
    figures: MetricValues = field(default_factory=dict)
    info: Mapping[str, MetricInfo] = field(default_factory=dict)
    gains: Mapping[str, Difference] = field(default_factory=dict)


class FigureRow(TypedDict):
    """A metric of every side. Of two sides the change, its kind (good, bad or "") and its interval and p ("" where not known)."""

    label: str
    name: str
    values: list[str]
    change: str
    kind: str
    interval: str
    p: str


class FigureTable(TypedDict):
    """Figures of some sides. labels: of the sides. notes: what stands below the table."""

    title: str
    labels: list[str]
    rows: list[FigureRow]
    notes: Sequence[str]


def evaluation_page(run: str, summary: EvaluationSummary, rows: Mapping[str, list[AnswerRecord]]) -> str:
    """eval/NAME.html. rows: answers of "tuned" and, if measured, "base"."""
    base, tuned = rows.get("base", []), rows["tuned"]
    ranking = answers.ranking_of(tuned, summary.get("metric_info") or {})
    selected = answers.select(answers.pair(base, tuned), MAX_SAMPLES, ranking)
    headings = HEADINGS if base else {**HEADINGS, "largest gain": "Best answers"}
    all_shown = len(tuned) <= MAX_SAMPLES
    if all_shown:
        selected = sorted(selected, key=lambda p: -ranking.value(p.tuned))
    sides, info = [], summary.get("metric_info") or {}
    if base:
        sides.append(Side("base", "base", "", base, _figures(summary.get("base_metrics"), summary.get("base_eval_loss")), info))
    sides.append(Side("tuned" if base else "answer", "tuned", "", tuned, _figures(summary.get("metrics"), summary.get("eval_loss")), info, summary.get("gains") or {}))
    cards = [card(p.row, [(s, p.base if s.kind == "base" else p.tuned) for s in sides], headings[p.reason]) for p in selected]
    facts = [f"{summary['rows']} rows of {summary['data']}, split {summary['split']}"]
    facts += [f"checkpoint {summary['checkpoint']}"] if summary["checkpoint"] is not None else []
    facts += [f"data fingerprint {summary['fingerprint'][:12]}"]
    note = f"The best answers first, by {ranking.label}." if all_shown else f"{len(cards)} of {len(tuned)}, by {ranking.label}."
    return _page(run, "mmft evaluation", " · ".join(facts), sides, cards, note, [*answer_notes(summary), *(f"{k}: {n}" for k in summary.get("keep") or {} for n in answer_notes(summary, k)[:1])], confusion=confusion_table(summary.get("confusion"), tuned))


def _figures(metrics: MetricValues | None, loss: float | None) -> MetricValues:
    return {**(metrics or {}), **({"eval_loss": loss} if is_number(loss) else {})}


def comparison_page(title: str, meta: str, sides: Sequence[Side], parts: Sequence[PlanTableRow], measured: Sequence[Sequence[Side]] = ()) -> str:
    """A page of all samples of a comparison. parts: the adapter plan (tables.plan_rows), or []. measured: two sides over all held-out rows each."""
    cards = [card(rows[0], list(zip(sides, rows, strict=True)), "") for rows in zip(*(s.rows for s in sides), strict=True)]
    return _page(title, "mmft comparison", meta, sides, cards, "", side_notes(sides), parts, measured=measured)


def measured_title(sides: Sequence[Side]) -> str:
    """The heading of what runs measured. A side's `about` is the name of the kept set, or ""."""
    what = f"the kept set {sides[0].about}" if sides[0].about else "all held-out rows"
    return f"{sides[0].label} against {sides[1].label} on {what} of both"


def _page(
    title: str, kicker: str, meta: str, sides: Sequence[Side], cards: Sequence[SampleCard], note: str, metric_notes: Sequence[str],
    parts: Sequence[PlanTableRow] = (), confusion: ConfusionTable | None = None, measured: Sequence[Sequence[Side]] = (),
) -> str:  # fmt: skip
    tables: list[FigureTable] = [{"title": "Figures", "labels": [s.label for s in sides], "rows": rows, "notes": metric_notes}] if (rows := figure_rows(sides)) else []
    tables += [{"title": measured_title(two), "labels": [s.label for s in two], "rows": figure_rows(two), "notes": side_notes(two)} for two in measured]
    prompts = {c["prompt"] for c in cards}
    return render(
        "answers.html.j2", title=title, kicker=kicker, meta=meta, sides=sides, samples=cards, note=note, tables=tables, confusion=confusion,
        diagrams=diagrams([(s.label, s.rows) for s in sides]),
        prompt=prompts.pop() if len(prompts) == 1 and len(cards) > 1 else "", referenced=any(c["references"] for c in cards), parts=parts,
    )  # fmt: skip


def card(row: AnswerRecord, sides: Sequence[tuple[Side, AnswerRecord | None]], heading: str) -> SampleCard:
    """One sample with every side's answer to it.

    Words are marked against the nearest reference; without references, the later sides' against the first side's answer.
    """
    references = [str(r) for r in row.get("references") or ()]
    texts = [str((answer or {}).get("prediction") or "") for _, answer in sides]
    shown: list[ShownAnswer] = []
    for i, (side, answer) in enumerate(sides):
        text = texts[i]
        against = answers.nearest_reference(text, references) if references else texts[0] if i else ""
        verdict = answers.verdict(answer) if references else ("none", "", "the same text" if i and text == against else "")
        shown.append({"name": side.label, "kind": side.kind, "empty": not text.strip(), "chance": chance(answer), "verdict": verdict,
                      "pieces": answers.difference(text, against)})  # fmt: skip
    if references:
        nearest = answers.nearest_reference(texts[-1], references)
        references = [nearest, *(r for r in references if r != nearest)]
    name = row.get("id", row.get("index", ""))
    return {"id": f"{row['index']} · {name}" if "index" in row else str(name), "heading": heading, "prompt": str(row.get("prompt") or ""),
            "references": references, "texts": shown, **shown_pictures(row, PICTURE_SIDE, PICTURES_PER_SAMPLE, [boxes_of(side.kind, side.label, answer) for side, answer in sides])}  # fmt: skip


def side_notes(sides: Sequence[Side]) -> list[str]:
    """What stands next to the metrics: rows, references per row, and each side's answers that reached the limit of new tokens."""
    counts = [count_answers(side.rows) for side in sides]
    notes = [rows_note(counts[0])] if counts else []
    if any(c["truncated"] for c in counts):
        notes.append("Answers cut off at generation.max_new_tokens: " + ", ".join(f"{s.label} {c['truncated']}" for s, c in zip(sides, counts, strict=True)) + ".")
    return notes + metric_notes(sides[0].info) + interval_notes(sides[-1].gains if len(sides) == 2 else {})


def figure_rows(sides: Sequence[Side]) -> list[FigureRow]:
    """One row for each metric that any side has; of two sides with the change."""
    rows: list[FigureRow] = []
    names = metric_names([s.figures for s in sides])
    for name in sorted(names, key=lambda name: name == "eval_loss"):  # the loss last
        info = info_of(name, sides[0].info)
        loss, higher = name == "eval_loss", info["higher_is_better"] and name != "eval_loss"
        label = info["label"] if not loss else "Loss"
        values = [s.figures.get(name) for s in sides]
        two = len(values) == 2
        change = numbers.change(values[0], values[1]) if two else ""
        gap = sides[1].gains.get(name) if two else None
        kind = change_kind(values[0], values[1], higher, gap) if two else ""
        rows.append({"label": label if higher else f"{label} (lower is better)", "name": name, "values": [numbers.metric(v) for v in values],
                     "change": change, "kind": kind, "interval": numbers.interval(gap), "p": numbers.p_value(gap)})  # fmt: skip
    return rows
