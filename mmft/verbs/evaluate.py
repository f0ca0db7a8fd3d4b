"""`mmft evaluate run=DIR [data=...] [evaluation.split=...] [base=true]`: all metrics of training on any prepared split."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig

from ..common.errors import UserError, at_least
from ..common.records import AnswerRecord, EvaluationSummary
from ..config.plain import resolved
from ..config.settings import Settings
from ..config.snapshot import snapshot
from ..runs.directory import Run, plain_name

if TYPE_CHECKING:
    from rich.table import Table

    from ..collators.types import BatchMaker
    from ..data.prepared import PreparedData
    from ..data.sample import Sample
    from ..evaluation.preferences import AsReference
    from ..runs.open import OpenedRun, Opener

log = logging.getLogger("mmft")


@dataclass
class Evaluate:
    """The keys of conf/task/evaluate.yaml.

    Writes eval/NAME.jsonl (every answer), NAME_base.jsonl, NAME.json (metrics) and NAME.html into the run, or into a new directory for a
    model without one. NAME says data, split and checkpoint and ends in a hash of everything that decides the result, so that the same
    evaluation replaces its own files and no others.
    """

    run: str | None = None
    checkpoint: int | None = None
    base: bool = False
    backend: str = "transformers"
    vllm: Any = None
    check: int = 4

    def __call__(self, cfg: DictConfig, overrides: list[str], opener: Opener | None = None) -> EvaluationSummary:
        """Measure, write, and return the metrics. opener: opens the model, None: it is loaded here. Raises UserError."""
        from ..serving.vllm.choice import opener_for

        at_least(self, check=0)
        with opener_for(self.backend, self.vllm, self.check, opener) as chosen:
            return self._measure(cfg, overrides, chosen)

    def _measure(self, cfg: DictConfig, overrides: list[str], opener: Opener) -> EvaluationSummary:
        from ..data.prepare import prepared_data
        from ..data.selection import evaluation_rows
        from ..evaluation.choose import check_choices
        from ..evaluation.kept import kept_results, kept_sets, merge
        from ..evaluation.measurement import base_results, measure, tuned_results
        from ..evaluation.metrics.defaults import metric_set
        from ..reports import terminal
        from ..runs.open import any_config

        if self.base and self.run is None:
            raise UserError("base=true: a model without an adapter is its own base; drop base=true, or name a run")
        started = time.time()
        run, run_cfg = any_config(self.run, cfg, overrides, self.checkpoint)
        settings = resolved(run_cfg)
        self._check_backend(settings)
        prepared = prepared_data(run_cfg)
        rows = evaluation_rows(prepared, settings["evaluation"])
        check_choices(settings["evaluation"], rows, str(settings["evaluation"]["split"]))
        metric_set(settings.get("metrics")).check(rows, answer=settings["evaluation"].get("answer", "generate"))
        kept = kept_sets(settings)
        opened = opener(self.run, cfg, overrides, self.checkpoint)
        summary = self._describe(prepared, len(rows), settings, opened, [(k.name, k.prepared.fingerprint, len(k.rows)) for k in kept])
        log.info("%d rows of %s, split %s", len(rows), prepared.manifest["name"], summary["split"])
        evaluator = opened.evaluator(rows)
        summary["max_new_tokens"], summary["longest_reference"] = evaluator.limit.max_new_tokens, evaluator.limit.longest
        log.info("%-14s %s", "generation", evaluator.limit.note)
        if not opened.backend:
            evaluator.collator = with_features(opened, settings, prepared, rows)
        evaluators = {k.name: opened.evaluator(k.rows, k) for k in kept}
        for name, its in evaluators.items():
            log.info("%-14s %s: %d rows, %s", "kept", name, len(its.rows), its.limit.note)
        before, kept_before = None, {}
        if self.base:
            with opened.base() as model:
                before = measure(evaluator, model)
                kept_before = {name: measure(its, model) for name, its in evaluators.items()}
                summary |= base_results(before)
        tuned = measure(evaluator, opened.model)
        summary |= tuned_results(evaluator.metrics, tuned, before)
        self._compare(summary, settings, opened, evaluator.collator, prepared)
        answers = {"": tuned.answers, **({"_base": before.answers} if before else {})}
        for k in kept:
            after = measure(evaluators[k.name], opened.model)
            merge(summary, kept_results(k, evaluators[k.name], kept_before.get(k.name), after))
            answers[f"_keep_{k.name}"] = after.answers
            if k.name in kept_before:
                answers[f"_keep_{k.name}_base"] = kept_before[k.name].answers
        summary["seconds"] = round(time.time() - started, 3)
        if run is None:
            run = new_directory(run_cfg, overrides, opened, prepared)
        written = write(run, summary, answers)
        run.record("evaluate", overrides, written)
        sources = terminal.sources_table(summary)
        terminal.show(*(terminal.results_tables(summary) if self.base else metrics_tables(summary)), *([] if sources is None else [sources]))
        log.info("\nanswers  %s\npage     %s", written[0], written[-1])
        return summary

    def _check_backend(self, settings: Settings) -> None:
        """Raises UserError for what vLLM does not compute."""
        from ..config.build import build

        if self.backend == "vllm" and build(settings["objective"], "objective").PREFERENCE:
            raise UserError("backend=vllm: the scores of preferences are computed with backend=transformers only, which this run's objective needs")

    def _compare(self, summary: EvaluationSummary, settings: Settings, opened: OpenedRun, collator: BatchMaker, prepared: PreparedData) -> None:
        """Add the scores of preferences to the summary, for a run whose objective learned from them; bad answers are compared, too."""
        from ..config.build import build
        from ..data.selection import first_rows
        from ..evaluation.preferences import evaluator_of

        objective = build(settings["objective"], "objective")
        if not objective.PREFERENCE or opened.run is None:
            return
        rows = first_rows(prepared.split(str(settings["evaluation"]["split"])), settings["evaluation"]["max_samples"])
        size = settings["trainer"].get("per_device_eval_batch_size", 8)
        found = evaluator_of(objective, opened.model, collator, rows, size, reference_of(opened, settings))
        if found is None:
            return
        values = found.measure(opened.model)
        summary["metrics"], summary["metric_info"] = {**summary["metrics"], **values}, {**summary["metric_info"], **found.info(values)}
        if self.base and objective.REFERENCE:
            summary["base_metrics"] = {**summary["base_metrics"], **found.measure_reference()}

    def _describe(self, prepared: PreparedData, rows: int, settings: Settings, opened: OpenedRun, kept: list[tuple[str, str, int]]) -> EvaluationSummary:
        """What is measured, and the name of its files. kept: name, fingerprint and rows of each kept set."""
        split = settings["evaluation"]["split"]
        identity: dict[str, Any] = {
            "fingerprint": prepared.fingerprint, "split": split, "rows": rows, "checkpoint": self.checkpoint, "base": self.base,
            "generation": {k: v for k, v in settings["generation"].items() if v is not None},
        }  # fmt: skip
        if settings["evaluation"].get("answer", "generate") == "choose":
            identity |= {"answer": "choose", "choice_norm": settings["evaluation"].get("choice_norm", "none")}
        identity |= {"backend": opened.backend} if opened.backend else {}
        hashed = {**identity, **({"keep": kept} if kept else {})}
        code = hashlib.sha256(json.dumps(hashed, sort_keys=True, default=str).encode()).hexdigest()[:8]
        words = [prepared.manifest["name"], split, f"checkpoint-{self.checkpoint}" if self.checkpoint is not None else "", code]
        described = {
            "name": "_".join(plain_name(w) for w in words if w), **identity, "data": prepared.manifest["name"],
            "model": opened.loaded.located.path, "method": "lora" if hasattr(opened.model, "disable_adapter") else "full",
            "base_eval_loss": None, "base_metrics": {},
        }  # fmt: skip
        return cast(EvaluationSummary, described)


def reference_of(opened: OpenedRun, settings: Settings) -> AsReference | None:
    """What makes a run's model the reference that it was trained with: its adapter off, or the adapter of lora.start; None where that is gone."""
    from ..adapters.frozen import FrozenAdapter
    from ..adapters.stored import fill
    from ..evaluation.preferences import without_adapter
    from ..runs.parents import start_of

    assert opened.run is not None
    if settings["lora"].get("bias") not in (None, "none"):  # they stand in the base's own layers, whatever is switched off
        log.info("%-14s lora.bias=%s has trained biases of the base, so the reference is gone", "preferences", settings["lora"]["bias"])
        return None
    try:
        start = start_of(opened.run, settings["output_dir"])
    except UserError as error:
        log.info("%-14s %s", "preferences", error)
        return None
    if start is None or not hasattr(opened.model, "disable_adapter"):
        return without_adapter
    own = FrozenAdapter.of(opened.model)
    fill(opened.model, start.folder)
    before = FrozenAdapter.of(opened.model)
    own.restore(opened.model)
    return before.switched


def with_features(opened: OpenedRun, settings: Settings, prepared: PreparedData, rows: Sequence[Sample]) -> BatchMaker:
    """The run's collator with image features from a cache, so that loss and answers, of base and tuned model, compute them once."""
    from ..collators.base import Collator
    from ..common.memo import Memo
    from ..feature_cache.cache import CachedCollator
    from ..feature_cache.policy import open_cache, why_adapted

    assert isinstance(opened.collator, Collator)
    settings = cast("Settings", {**settings, "vision_cache": "off" if settings.get("vision_cache") == "off" else "auto"})
    seen = len(rows) if settings["evaluation"]["split"] == "train" else 0
    cache = open_cache(settings, opened.loaded, why_adapted(opened.model), opened.collator, prepared, rows, seen, Memo())
    return opened.collator if cache is None else CachedCollator(opened.collator, cache)


def new_directory(cfg: DictConfig, overrides: list[str], opened: OpenedRun, prepared: PreparedData) -> Run:
    """A new directory below output_dir for the metrics of a model without a run."""
    from ..runs.environment import environment

    words = ["evaluate", cfg.name or Path(opened.loaded.located.path.split(":")[-1]).name, prepared.manifest["name"]]
    run = Run.create(cfg.output_dir, words, cfg.run_dir)
    run.write_text("snapshot.yaml", snapshot(cfg))
    run.write_text("overrides.txt", "".join(f"{word}\n" for word in overrides))
    run.write_json("env.json", environment(opened.loaded, prepared, opened.settings["seed"]))
    return run


def write(run: Run, summary: EvaluationSummary, answers: dict[str, list[AnswerRecord]]) -> list[Path]:
    """Write the evaluation's files and return their paths, the answers first, the page last.

    answers: by the end of their file's name; "" for those of the tuned model, "_base" for those of its base.
    """
    from ..reports.answers_page import evaluation_page

    name = summary["name"]
    written = [run.write_lines(f"eval/{name}{end}.jsonl", rows) for end, rows in answers.items()]
    finite: EvaluationSummary = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}  # type: ignore[assignment]  # JSON has no NaN
    written.append(run.write_json(f"eval/{name}.json", finite))
    written.append(run.write_text(f"eval/{name}.html", evaluation_page(run.name, finite, {"tuned": answers[""], "base": answers.get("_base", [])})))
    return written


def metrics_tables(summary: EvaluationSummary) -> list[Table]:
    """The metrics of one model on its own data, and on each kept set."""
    from ..reports import terminal
    from ..reports.tables import answer_notes, metric_rows

    tables = []
    for kept in (None, *(summary.get("keep") or {})):
        what = summary if kept is None else summary["keep"][kept]
        name = f"{what['rows']} rows of {what['data']}, {what['split']}"
        table = terminal.pairs_table(name if kept is None else f"Kept: {kept}, {name}", {"loss" if r["name"] == "eval_loss" else r["name"]: r["tuned"] for r in metric_rows(summary, kept)})
        table.caption = "\n".join(answer_notes(summary, kept))
        tables.append(table)
    return tables
