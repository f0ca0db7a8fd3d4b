"""Answers of base and tuned model, or of several runs, to the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import cast

from omegaconf import DictConfig

from ..common.files import read_jsonl
from ..common.records import AnswerRecord
from ..evaluation.answer import answer_prompts
from ..evaluation.evaluate import mean_loss
from ..evaluation.inputs import Asked
from ..evaluation.metrics.base import MetricSet
from ..evaluation.resampling import FEWEST, LOSS, differences, paired
from ..reports.answers_page import Side
from .directory import Run
from .open import Opener, open_any


def run_sides(path: str, cfg: DictConfig, overrides: list[str], checkpoint: int | None, asked: Sequence[Asked], with_base: bool, opener: Opener = open_any) -> Iterator[Side]:
    """The answers of a run, those of its base first if asked for. The model is freed at the end. Raises UserError."""
    opened = opener(path, cfg, overrides, checkpoint)
    about = f"{path}{f', checkpoint {checkpoint}' if checkpoint is not None else ''}"
    for kind in ("base", "tuned") if with_base else ("tuned",):
        with opened.base() if kind == "base" else contextlib.nullcontext():
            records = list(answer_prompts(opened.evaluator([]), opened.model, asked, opened.settings["seed"]))
        yield Side(kind, kind, f"{opened.loaded.located.path}, the adapter switched off" if kind == "base" else about, records)


def label_runs(sides: list[Side]) -> None:
    """Label the sides of several runs A, B, ...; the first is the one the others are compared with."""
    for i, side in enumerate(sides):
        side.label, side.kind = chr(ord("A") + i) if i < 26 else str(i), "base" if i == 0 else "tuned"


def drop_unanswered(sides: list[Side]) -> list[str]:
    """Remove from every side the prompts that one of them could not answer; returns the reasons."""
    reasons: dict[int, str] = {}
    for side in sides:
        for record in side.rows:
            if record.get("error"):
                reasons.setdefault(record["index"], record["error"])
    for side in sides:
        side.rows = [r for r in side.rows if r["index"] not in reasons]
    return list(reasons.values())


def add_metrics(sides: list[Side], metrics: MetricSet) -> None:
    """Compute the metrics of every side over the prompts with references, if there are at least two; of two sides the differences too."""
    for side in sides:
        referenced = [r for r in side.rows if r["references"]]
        if len(referenced) > 1:
            side.figures, side.info = metrics.corpus(referenced), metrics.info(referenced)
    if len(sides) == 2 and sides[1].figures:
        sides[1].gains = differences(metrics, sides[0].rows, sides[1].rows)


def measured_sides(runs: list[Run], metrics: MetricSet, kept: dict[str, MetricSet]) -> list[list[Side]]:
    """What the runs' own files say of all held-out rows, then of each kept set: base and tuned of one run, or the first run and each other.

    Two sides each, over the rows that both have; none where there are fewer than two. kept: the metrics of each kept set.
    """
    compared: list[list[Side]] = []
    measured: list[tuple[str | None, MetricSet]] = [(None, metrics), *kept.items()]
    for second in runs[1:] or runs:
        for name, own in measured:
            first = answers_of(runs[0], name, "base" if len(runs) == 1 else "tuned")
            pairs = paired(first, answers_of(second, name, "tuned"))
            if len(pairs) < FEWEST:
                continue
            sides = [Side("base", "base", name or "", [a for a, _ in pairs]), Side("tuned", "tuned", name or "", [b for _, b in pairs])]
            if len(runs) > 1:
                sides[0].label, sides[1].label = "A", chr(ord("A") + runs.index(second))
            add_metrics(sides, own)
            for side in sides:
                losses = [(r["loss"], r["loss_tokens"]) for r in side.rows if r.get("loss_tokens")]
                side.figures |= {LOSS: mean_loss(losses)} if losses else {}
            compared.append(sides)
    return compared


def answers_of(run: Run, kept: str | None, which: str) -> list[AnswerRecord]:
    """The rows of eval/*.jsonl of a run, or of one of its kept sets. which: base or tuned."""
    return cast("list[AnswerRecord]", read_jsonl(run / "eval" / (f"keep/{kept}_{which}.jsonl" if kept else f"{which}.jsonl")))
