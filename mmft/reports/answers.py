"""Answers side by side on one offline page: an evaluation (base and tuned), or a comparison of any models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..config.library_keys import METRICS
from . import comparison, numbers
from .files import is_number
from .page import LABELS, PICTURE_SIDE, PICTURES_A_SAMPLE, SAMPLES, render, shown_pictures


@dataclass
class Side:
    """One model's answers. kind: base, tuned or other (its colour). rows: as in eval/*.jsonl, the same samples for every side."""

    label: str
    kind: str
    about: str
    rows: list[dict[str, Any]]
    figures: dict[str, float] = field(default_factory=dict)  # metrics over the rows, and eval_loss where it was measured


def evaluation_page(run: str, summary: dict[str, Any], answers: dict[str, list[dict[str, Any]]]) -> str:
    """eval/NAME.html from the evaluation's figures and the answers of base (if measured) and tuned."""
    base, tuned = answers.get("base", []), answers["tuned"]
    chosen = comparison.select(comparison.pair(base, tuned), SAMPLES)
    titles = {"largest gain": "Largest gains" if base else "Best answers", "even spread": "An even spread of the rest", "worst answer": "Worst answers"}
    few = len(tuned) <= SAMPLES
    if few:  # all of them are shown
        chosen = sorted(chosen, key=lambda p: -comparison.scores(p["tuned"]).get("token_f1", 0.0))
    sides = [Side(name, name, "", rows) for name, rows in (("base", base), ("tuned", tuned)) if rows]
    for side in sides:
        loss = summary["base_eval_loss" if side.label == "base" else "eval_loss"]
        side.figures = {**summary["base_metrics" if side.label == "base" else "metrics"], **({"eval_loss": loss} if is_number(loss) else {})}
    if not base:
        sides[0].label = "answer"
    cards = [{**card(p["row"], [(s, p[s.kind]) for s in sides]), "title": titles.get(p["why"], "")} for p in chosen]
    facts = [f"{summary['rows']} rows of {summary['data']}, split {summary['split']}"]
    facts += [f"checkpoint {summary['checkpoint']}"] if summary["checkpoint"] is not None else []
    facts += [f"data fingerprint {summary['fingerprint'][:12]}"]
    note = "The best answers first, by token F1." if few else f"{len(cards)} of {len(tuned)}, by token F1."
    return _page(f"{run}", "mmft evaluation", " · ".join(facts), sides, cards, note)


def comparison_page(title: str, meta: str, sides: list[Side], parts: list[dict[str, str]]) -> str:
    """A page of all samples of a comparison; `parts` is the adapter plan by part (page.plan_rows), where there is one."""
    cards = [{**card(rows[0], list(zip(sides, rows, strict=True))), "title": ""} for rows in zip(*(s.rows for s in sides), strict=True)]
    return _page(title, "mmft comparison", meta, sides, cards, "", parts)


def _page(title: str, kicker: str, meta: str, sides: list[Side], cards: list[dict], note: str, parts: Sequence[dict[str, str]] = ()) -> str:
    prompts = {c["prompt"] for c in cards}
    return render(
        "answers.html.j2", title=title, kicker=kicker, meta=meta, sides=sides, samples=cards, note=note, metrics=metric_rows(sides),
        prompt=prompts.pop() if len(prompts) == 1 and len(cards) > 1 else "", referenced=any(c["references"] for c in cards), parts=parts,
    )  # fmt: skip


def card(row: dict[str, Any], texts: list[tuple[Side, dict[str, Any]]]) -> dict[str, Any]:
    """One sample with the text of every side.

    Words are marked against the nearest reference; without one, those of the later sides against the first side's text.
    """
    references = [str(r) for r in row.get("references") or ()]
    shown = []
    for i, (side, own) in enumerate(texts):
        text = str((own or {}).get("prediction") or "")
        against = comparison.nearest(text, references) if references else str((texts[0][1] or {}).get("prediction") or "") if i else ""
        verdict = comparison.verdict(own) if references else ("none", "", "the same text" if i and text == against else "")
        shown.append({"name": side.label, "kind": side.kind, "empty": not text.strip(), "verdict": verdict,
                      "pieces": comparison.difference(text, against)})  # fmt: skip
    if references:
        last = str((texts[-1][1] or {}).get("prediction") or "")
        close = comparison.nearest(last, references)
        references = [close, *(r for r in references if r != close)]
    name = row.get("id", row.get("index", ""))
    return {"id": f"{row['index']} · {name}" if "index" in row else str(name), "prompt": str(row.get("prompt") or ""),
            "references": references, "texts": shown, **shown_pictures(row, PICTURE_SIDE, PICTURES_A_SAMPLE)}  # fmt: skip


def metric_rows(sides: list[Side]) -> list[dict[str, Any]]:
    """One row a figure: the values of all sides, and of two sides the change."""
    names = [m for m in (*METRICS, "eval_loss") if any(m in s.figures for s in sides)]
    rows = []
    for name in names:
        values: list[Any] = [s.figures.get(name) for s in sides]
        both = len(values) == 2 and all(map(is_number, values)) and round(values[0], 3) != round(values[1], 3)
        kind = ("good" if (values[1] > values[0]) == (name != "eval_loss") else "bad") if both else ""
        rows.append({"label": LABELS.get(name, "Loss (lower is better)"), "name": name, "values": [numbers.metric(v) for v in values],
                     "change": numbers.change(*values) if len(values) == 2 else "", "kind": kind})  # fmt: skip
    return rows
