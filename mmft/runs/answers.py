"""Answers of base and tuned model, or of several runs, to the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from omegaconf import DictConfig

from ..evaluation.answer import answer_prompts
from ..evaluation.inputs import Asked
from ..evaluation.metrics.base import MetricSet
from ..reports.answers_page import Side
from .open import open_run


def run_sides(path: str, cfg: DictConfig, overrides: list[str], checkpoint: int | None, asked: list[Asked], with_base: bool) -> Iterator[Side]:
    """The answers of a run, those of its base first if asked for. The model is freed at the end. Raises UserError."""
    opened = open_run(path, cfg, overrides, checkpoint)
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
    """Compute the metrics of every side over the prompts with references, if there are at least two."""
    for side in sides:
        referenced = [r for r in side.rows if r["references"]]
        if len(referenced) > 1:
            side.figures, side.info = metrics.corpus(referenced), metrics.info(referenced)
