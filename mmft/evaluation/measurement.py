"""Measurement: what is known of one model on held-out rows, and the difference that training made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..common.records import AnswerRecord, Measured, MetricValues
from .evaluate import Evaluator, mean_loss
from .metrics.base import MetricSet
from .resampling import differences
from .token_limit import count_answers

if TYPE_CHECKING:
    import torch


@dataclass
class Measurement:
    """Loss, metrics and answers of one model on the held-out rows."""

    loss: float
    metrics: MetricValues
    answers: list[AnswerRecord]


def measure(evaluator: Evaluator, model: torch.nn.Module) -> Measurement:
    """The loss of every row first, then the generated answers and their metrics. Raises UserError."""
    losses = evaluator.row_losses(model)
    metrics, answers = evaluator.measure(model)
    for answer, (loss, tokens) in zip(answers, losses, strict=True):
        answer["loss"], answer["loss_tokens"] = loss, tokens
    return Measurement(mean_loss(losses), {**metrics, **evaluator.losses_of_sources(losses)}, answers)


def base_results(base: Measurement) -> Measured:
    """What a summary says of the base model."""
    return {"base_eval_loss": base.loss, "base_metrics": base.metrics, "base_answer_counts": count_answers(base.answers)}


def tuned_results(metrics: MetricSet, tuned: Measurement, base: Measurement | None) -> Measured:
    """What a summary says of the tuned model; with the differences from its base if that was measured."""
    results: Measured = {
        "eval_loss": tuned.loss, "metrics": tuned.metrics, "answer_counts": count_answers(tuned.answers),
        "metric_info": metrics.info(tuned.answers), "confusion": metrics.confusion(tuned.answers),
    }  # fmt: skip
    if base is not None:
        results["gains"] = differences(metrics, base.answers, tuned.answers)
    return results
