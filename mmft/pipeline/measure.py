"""Stages 3 and 6: measure the base model, and the tuned model, on the held-out rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from ..common.files import read_jsonl
from ..common.records import AnswerRecord
from ..evaluation.evaluate import Evaluator
from ..runs.directory import Run
from .context import RunContext
from .load import Base
from .prepare import TrainingInputs

if TYPE_CHECKING:
    import torch


@dataclass
class Measurement:
    """Loss, metrics and answers of one model on the held-out rows."""

    loss: float
    metrics: dict[str, float]
    answers: list[AnswerRecord]


def measure(evaluator: Evaluator, model: torch.nn.Module) -> Measurement:
    """Loss first, then the generated answers and their metrics."""
    return Measurement(evaluator.loss(model), *evaluator.measure(model))


def measure_base(inputs: TrainingInputs, base: Base, context: RunContext) -> Measurement | None:
    """The untouched model, before an adapter or a step can change it; measured once for all runs that would measure the same."""
    evaluator, s = base.evaluator, inputs.settings
    if evaluator is None or not s["evaluation"]["base"]:
        return None
    rows = (s["evaluation"]["split"], s["evaluation"]["max_samples"], s["evaluation"]["batch_size"], s["trainer"].get("per_device_eval_batch_size"))
    key = inputs.base_key("base", s["generation"], rows, s["seed"] if s["generation"].get("do_sample") else None)
    return copy.deepcopy(context.memo.once(key, lambda: measure(evaluator, base.loaded.model)))  # the run may change it


def read_base_measurement(run: Run) -> Measurement | None:
    """What a resumed run has measured before; None if it has not."""
    if not (run / "base.json").is_file():
        return None
    stored = run.read_json("base.json")
    answers = cast("list[AnswerRecord]", read_jsonl(run / "eval" / "base.jsonl"))
    return Measurement(stored["loss"], stored["metrics"], answers)


def write_base_measurement(run: Run, measured: Measurement) -> None:
    run.write_lines("eval/base.jsonl", measured.answers)
    run.write_json("base.json", {"loss": measured.loss, "metrics": measured.metrics})
