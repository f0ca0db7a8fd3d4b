"""The eight text metrics that are measured by default, as functions of texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from ...common.errors import UserError
from ...common.records import AnswerRecord, MetricValues
from .answers import Contains, ExactMatch, ExactMatchNormalized, TokenF1, VqaAccuracy
from .base import MetricSet
from .captions import Bleu4, Cider, RougeL


@cache
def default_metrics() -> MetricSet:
    """The metrics of conf/metrics/text.yaml; also those of runs whose config has no section `metrics`."""
    return MetricSet({
        "exact_match": ExactMatch(), "exact_match_normalized": ExactMatchNormalized(), "contains": Contains(), "token_f1": TokenF1(),
        "vqa_accuracy": VqaAccuracy(), "bleu4": Bleu4(), "rouge_l": RougeL(), "cider": Cider(),
    })  # fmt: skip


def metric_set(section: Mapping[str, Any] | None) -> MetricSet:
    """The metrics of the config's section `metrics`; the default ones for runs whose config has none. Raises UserError."""
    return default_metrics() if section is None else MetricSet.from_config(section)


def compute(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> MetricValues:
    """Every metric over a set: predictions[i] against all of references[i].

    Raises UserError if there is nothing to measure, the lengths differ, or a sample has no reference.
    """
    if len(predictions) != len(references):
        raise UserError(f"metrics: {len(predictions)} predictions for {len(references)} lists of references")
    rows: list[AnswerRecord] = []
    for i, (prediction, texts) in enumerate(zip(predictions, references, strict=True)):
        rows.append({"id": str(i), "prediction": prediction, "references": list(texts), "metrics": per_sample(prediction, texts, f"sample {i}")})
    return default_metrics().corpus(rows)


def per_sample(prediction: str, references: Sequence[str], where: str = "sample") -> MetricValues:
    """The metrics of one sample; `where` names it in errors. Raises UserError if it has no list of references."""
    if isinstance(references, str) or not references:
        raise UserError(f"metrics: {where} has no list of references")
    return default_metrics().row({"prediction": prediction, "references": list(references)})
