"""`mmft evaluate run=DIR [data=...] [evaluation.split=...] [base=true]`: all metrics of training on any prepared split."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig

from ..common.errors import UserError
from ..common.records import AnswerRecord, EvaluationSummary
from ..config.plain import resolved
from ..config.settings import Settings
from ..config.snapshot import snapshot
from ..runs.directory import Run, plain_name

if TYPE_CHECKING:
    from rich.table import Table

    from ..data.prepared import PreparedData
    from ..runs.open import OpenedRun

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

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> EvaluationSummary:
        """Measure, write, and return the metrics. Raises UserError."""
        from ..data.prepare import prepared_data
        from ..data.selection import evaluation_rows
        from ..evaluation.token_limit import count_answers
        from ..reports import terminal
        from ..runs.open import any_config, open_any

        if self.base and self.run is None:
            raise UserError("base=true: a model without an adapter is its own base; drop base=true, or name a run")
        started = time.time()
        run, run_cfg = any_config(self.run, cfg, overrides, self.checkpoint)
        settings = resolved(run_cfg)
        prepared = prepared_data(run_cfg)
        rows = evaluation_rows(prepared, settings["evaluation"])
        opened = open_any(self.run, cfg, overrides, self.checkpoint)
        summary = self._describe(prepared, len(rows), settings, opened)
        log.info("%d rows of %s, split %s", len(rows), prepared.manifest["name"], summary["split"])
        evaluator = opened.evaluator(rows)
        evaluator.metrics.check(rows)
        summary["max_new_tokens"], summary["longest_reference"] = evaluator.limit.max_new_tokens, evaluator.limit.longest
        log.info("%-14s %s", "generation", evaluator.limit.note)
        answers: dict[str, list[AnswerRecord]] = {}
        if self.base:
            with opened.base() as model:
                summary["base_eval_loss"] = evaluator.loss(model)
                summary["base_metrics"], answers["base"] = evaluator.measure(model)
                summary["base_answer_counts"] = count_answers(answers["base"])
        summary["eval_loss"] = evaluator.loss(opened.model)
        summary["metrics"], answers["tuned"] = evaluator.measure(opened.model)
        summary["answer_counts"] = count_answers(answers["tuned"])
        summary["metric_info"], summary["confusion"] = evaluator.metrics.info(answers["tuned"]), evaluator.metrics.confusion(answers["tuned"])
        summary["seconds"] = round(time.time() - started, 3)
        if run is None:
            run = new_directory(run_cfg, overrides, opened, prepared)
        written = write(run, summary, answers)
        run.record("evaluate", overrides, written)
        terminal.show(terminal.results_table(summary) if self.base else metrics_table(summary))
        log.info("\nanswers  %s\npage     %s", written[0], written[-1])
        return summary

    def _describe(self, prepared: PreparedData, rows: int, settings: Settings, opened: OpenedRun) -> EvaluationSummary:
        """What is measured, and the name of its files."""
        split = settings["evaluation"]["split"]
        identity: dict[str, Any] = {
            "fingerprint": prepared.fingerprint, "split": split, "rows": rows, "checkpoint": self.checkpoint, "base": self.base,
            "generation": {k: v for k, v in settings["generation"].items() if v is not None},
        }  # fmt: skip
        code = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:8]
        words = [prepared.manifest["name"], split, f"checkpoint-{self.checkpoint}" if self.checkpoint is not None else "", code]
        described = {
            "name": "_".join(plain_name(w) for w in words if w), **identity, "data": prepared.manifest["name"],
            "model": opened.loaded.located.path, "method": "lora" if hasattr(opened.model, "peft_config") else "full",
            "base_eval_loss": None, "base_metrics": {},
        }  # fmt: skip
        return cast(EvaluationSummary, described)


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
    """Write the evaluation's files and return their paths, the answers first, the page last."""
    from ..reports.answers_page import evaluation_page

    name = summary["name"]
    written = [run.write_lines(f"eval/{name}{'' if which == 'tuned' else '_base'}.jsonl", answers[which]) for which in reversed(answers)]
    finite: EvaluationSummary = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}  # type: ignore[assignment]  # JSON has no NaN
    written.append(run.write_json(f"eval/{name}.json", finite))
    written.append(run.write_text(f"eval/{name}.html", evaluation_page(run.name, finite, answers)))
    return written


def metrics_table(summary: EvaluationSummary) -> Table:
    """The metrics of one model."""
    from ..reports import numbers, terminal
    from ..reports.tables import answer_notes

    values = {k: numbers.metric(v) for k, v in {**summary["metrics"], "loss": summary["eval_loss"]}.items()}
    table = terminal.pairs_table(f"{summary['rows']} rows of {summary['data']}, {summary['split']}", values)
    table.caption = "\n".join(answer_notes(summary))
    return table
