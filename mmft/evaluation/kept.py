"""KeptSet: a data set of evaluation.keep, measured before and after a training to see what it lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.hashing import key_of
from ..common.records import KeptRecord, Measured, MetricInfo
from ..config.build import build
from ..config.keep import PREPARED, score_name
from ..config.settings import KeptSection, Settings
from ..data.mix import Mix
from ..data.prepare import prepare
from ..data.prepared import PreparedData
from ..data.sample import Sample
from ..data.selection import Subset
from .choose import Chooser
from .evaluate import Evaluator
from .measurement import Measurement, base_results, tuned_results
from .metrics.base import MetricSet

Once = Callable[[str, Callable[[], PreparedData]], PreparedData]


@dataclass(frozen=True)
class KeptSet:
    """rows: those that are measured, of the split `split` of `prepared`. generation: the run's, with the set's limit of new tokens.
    too_long: what is done with rows longer than collator.max_length, `refuse` or `drop`.
    """

    name: str
    prepared: PreparedData
    split: str
    rows: Sequence[Sample]
    metrics: MetricSet
    generation: dict[str, Any]
    too_long: str = "refuse"


def kept_sets(settings: Settings, once: Once = lambda key, make: make()) -> list[KeptSet]:
    """The sets of evaluation.keep, prepared now if needed. once: remembers a prepared set by a key.

    Raises UserError for a set that cannot be prepared, has no held-out rows, or lacks what its metrics need.
    """
    return [_kept_set(name, section, settings, once) for name, section in (settings["evaluation"].get("keep") or {}).items()]


def _kept_set(name: str, section: KeptSection, settings: Settings, once: Once) -> KeptSet:
    try:
        prepared = once(key_of("prepared", section["data"], settings["output_dir"]), lambda: _prepared(name, section, settings))
        split = settings["evaluation"]["split"] or "validation"
        if not prepared.splits.get(split):
            more = "" if PREPARED in section["data"] else f"; evaluation.keep.{name}.data.splits.{split}=0.1 holds some out"
            raise UserError(f"has no held-out rows: its splits are {prepared.splits}, and evaluation.split is {split}{more}")
        rows = Subset(prepared.split(split), settings["evaluation"]["max_samples"])
        metrics = MetricSet.from_config(section["metrics"])
        metrics.check(rows, "evaluation.keep_metrics", "choose" if Chooser.for_rows(settings["evaluation"], rows) else "generate")
    except UserError as error:
        raise UserError(f"evaluation.keep={name}: {error}") from None
    limit = section.get("max_new_tokens")
    generation = {**settings["generation"], **({} if limit is None else {"max_new_tokens": limit})}
    return KeptSet(name, prepared, split, rows, metrics, generation, section["data"].get("too_long", "refuse"))


def _prepared(name: str, section: KeptSection, settings: Settings) -> PreparedData:
    if PREPARED in section["data"]:
        return PreparedData(section["data"][PREPARED])
    source = build(section["data"], f"evaluation.keep.{name}.data")
    if isinstance(source, Mix):
        raise UserError("is a mix; name its data sets one by one")
    return prepare(source, Path(settings["output_dir"]) / "data")


def kept_results(kept: KeptSet, evaluator: Evaluator, base: Measurement | None, tuned: Measurement | None) -> Measured:
    """What a summary says of a kept set: its scores beside those of the run's own data, named by `score_name`, and its rows."""
    parts: list[Measured] = [base_results(base)] if base else []
    parts += [tuned_results(kept.metrics, tuned, base)] if tuned else []
    merged: Measured = {}
    for part in parts:
        merged |= part
    limit = evaluator.limit
    record: KeptRecord = {
        "data": kept.prepared.manifest["name"], "fingerprint": kept.prepared.fingerprint, "split": kept.split, "rows": len(evaluator.rows),
        "max_new_tokens": limit.max_new_tokens, "longest_reference": limit.longest,
    }  # fmt: skip
    results: Measured = {"keep": {kept.name: record}}
    if base:
        record["base_answer_counts"] = merged["base_answer_counts"]
        results["base_metrics"] = {score_name(kept.name, k): v for k, v in {**base.metrics, "loss": base.loss}.items()}
    if tuned:
        record["answer_counts"] = merged["answer_counts"]
        results["metrics"] = {score_name(kept.name, k): v for k, v in {**tuned.metrics, "loss": tuned.loss}.items()}
        results["gains"] = {score_name(kept.name, k.removeprefix("eval_")): v for k, v in merged.get("gains", {}).items()}
        loss: MetricInfo = {"label": "Loss", "higher_is_better": False, "top": None}
        infos = {score_name(kept.name, k): copy.copy(v) for k, v in {**merged["metric_info"], "loss": loss}.items()}
        for info in infos.values():
            info["label"] = f"{kept.name}: {info['label']}"
        results["metric_info"] = infos
    return results


def merge(summary: Measured, results: Measured) -> None:
    """Add what `kept_results` returned to a summary, in place."""
    summary["metrics"] = {**summary.get("metrics", {}), **results.get("metrics", {})}
    summary["base_metrics"] = {**summary.get("base_metrics", {}), **results.get("base_metrics", {})}
    summary["gains"] = {**summary.get("gains", {}), **results.get("gains", {})}
    summary["metric_info"] = {**summary.get("metric_info", {}), **results.get("metric_info", {})}
    summary["keep"] = {**summary.get("keep", {}), **results.get("keep", {})}
