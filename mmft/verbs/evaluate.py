"""`mmft evaluate run=DIR [data=...] [evaluation.split=...] [base=true]`: all metrics of training on any prepared split."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..config.snapshot import snapshot
from ..config.validate import to_plain
from ..runs.directory import Run, plain_name

log = logging.getLogger("mmft")


@dataclass
class Evaluate:
    """Writes eval/NAME.jsonl (every answer), NAME_base.jsonl, NAME.json (figures) and NAME.html into the run, or a new directory.

    NAME says data, split and checkpoint and ends in a hash of what decides the result, so that the same evaluation
    replaces its own files and no other's.
    """

    run: str | None = None
    checkpoint: int | None = None
    base: bool = False

    def __call__(self, cfg: Any, overrides: list[str]) -> dict[str, Any]:
        from ..data.prepare import prepared_data
        from ..reports import terminal
        from ..runs.open import any_config, open_any

        if self.base and self.run is None:
            raise UserError("base=true: a model without an adapter is its own base; drop base=true, or name a run")
        started = time.time()
        run, kept = any_config(self.run, cfg, overrides, self.checkpoint)
        settings = to_plain(kept)
        prepared = prepared_data(kept)
        rows = rows_of(prepared, settings["evaluation"])
        opened = open_any(self.run, cfg, overrides, self.checkpoint)
        summary = self.describe(prepared, rows, settings, opened)
        log.info("%d rows of %s, split %s", len(rows), prepared.manifest["name"], summary["split"])
        evaluator = opened.evaluator(rows)
        answers = {}
        if self.base:
            with opened.base() as model:
                summary["base_eval_loss"] = evaluator.loss(model)
                summary["base_metrics"], answers["base"] = evaluator.measure(model)
        summary["eval_loss"] = evaluator.loss(opened.model)
        summary["metrics"], answers["tuned"] = evaluator.measure(opened.model)
        summary["seconds"] = round(time.time() - started, 3)
        if run is None:
            run = new_directory(kept, overrides, opened, prepared)
        wrote = write(run, summary, answers)
        run.record("evaluate", overrides, wrote)
        terminal.show(terminal.results_table(summary) if self.base else figures(summary))
        log.info("\nanswers  %s\npage     %s", wrote[0], wrote[-1])
        return summary

    def describe(self, prepared: Any, rows: Any, settings: dict[str, Any], opened: Any) -> dict[str, Any]:
        """What is measured, and the name its files get."""
        split = settings["evaluation"]["split"]
        decides = {
            "fingerprint": prepared.fingerprint, "split": split, "rows": len(rows), "checkpoint": self.checkpoint, "base": self.base,
            "generation": {k: v for k, v in settings["generation"].items() if v is not None},
        }  # fmt: skip
        code = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:8]
        words = [prepared.manifest["name"], split, f"checkpoint-{self.checkpoint}" if self.checkpoint is not None else "", code]
        return {
            "name": "_".join(plain_name(w) for w in words if w), **decides, "data": prepared.manifest["name"],
            "model": opened.loaded.located.path, "method": "lora" if hasattr(opened.model, "peft_config") else "full",
            "base_eval_loss": None, "base_metrics": {},
        }  # fmt: skip


def rows_of(prepared: Any, evaluation: dict[str, Any]) -> Any:
    """The rows to measure. Errors raised: UserError for a split the set does not have."""
    from ..evaluation.evaluate import Subset

    if evaluation["split"] is None:
        raise UserError(f"evaluation.split must be given: this run held nothing out; the set holds {prepared.splits}")
    if not prepared.splits.get(evaluation["split"]):
        raise UserError(f"evaluation.split={evaluation['split']}: the prepared set has no such rows, it holds {prepared.splits}")
    return Subset(prepared.split(evaluation["split"]), evaluation["max_samples"])


def new_directory(kept: Any, overrides: list[str], opened: Any, prepared: Any) -> Run:
    """Where the figures of a model without a run go: a directory of their own below output_dir."""
    from ..runs.environment import environment

    words = ["evaluate", kept.name or Path(opened.loaded.located.path.split(":")[-1]).name, prepared.manifest["name"]]
    run = Run.create(kept.output_dir, words, kept.run_dir)
    run.write_text("snapshot.yaml", snapshot(kept))
    run.write_text("overrides.txt", "".join(f"{word}\n" for word in overrides))
    run.write_json("env.json", environment(opened.loaded, prepared, opened.settings["seed"]))
    return run


def write(run: Run, summary: dict[str, Any], answers: dict[str, list[dict[str, Any]]]) -> list[Path]:
    """The evaluation's files, the answers first, the page last."""
    from ..reports.answers import evaluation_page

    name = summary["name"]
    wrote = [run.write_lines(f"eval/{name}{'' if which == 'tuned' else '_base'}.jsonl", answers[which]) for which in reversed(answers)]
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}  # JSON has no NaN
    wrote.append(run.write_json(f"eval/{name}.json", finite))
    wrote.append(run.write_text(f"eval/{name}.html", evaluation_page(run.name, finite, answers)))
    return wrote


def figures(summary: dict[str, Any]) -> Any:
    """The table of one model's figures."""
    from ..reports import numbers, terminal

    values = {k: numbers.metric(v) for k, v in {**summary["metrics"], "loss": summary["eval_loss"]}.items()}
    return terminal.pairs_table(f"{summary['rows']} rows of {summary['data']}, {summary['split']}", values)
