"""Stages 3 and 6: measure the base model, and the tuned model, on the held-out rows and on the sets of evaluation.keep."""

from __future__ import annotations

import copy
from typing import cast

from ..common.files import read_jsonl
from ..common.records import AnswerRecord
from ..evaluation.evaluate import Evaluator
from ..evaluation.measurement import Measurement, measure
from ..runs.directory import Run
from .context import RunContext
from .load import Base
from .prepare import TrainingInputs


def measure_base(inputs: TrainingInputs, base: Base, context: RunContext) -> Measurement | None:
    """The untouched model, before an adapter or a step can change it; measured once for all runs that would measure the same."""
    if base.evaluator is None or not inputs.settings["evaluation"]["base"]:
        return None
    return _measure_once(inputs, base, context, base.evaluator, inputs.prepared.fingerprint, inputs.settings.get("metrics"))


def measure_kept_base(inputs: TrainingInputs, base: Base, context: RunContext) -> dict[str, Measurement]:
    """The untouched model on each set of evaluation.keep, by name; once as above."""
    if not inputs.settings["evaluation"]["base"]:
        return {}
    sections = inputs.settings["evaluation"].get("keep") or {}
    return {kept.name: _measure_once(inputs, base, context, evaluator, kept.prepared.fingerprint, sections[kept.name]["metrics"]) for kept, evaluator in base.kept}


def _measure_once(inputs: TrainingInputs, base: Base, context: RunContext, evaluator: Evaluator, *measured: object) -> Measurement:
    s = inputs.settings
    rows = (s["evaluation"]["split"], s["evaluation"]["max_samples"], s["evaluation"]["batch_size"], s["trainer"].get("per_device_eval_batch_size"),
            s["evaluation"].get("answer"), s["evaluation"].get("choice_norm"))  # fmt: skip
    key = inputs.base_key("base", evaluator.generation, rows, s["seed"] if evaluator.generation.get("do_sample") else None, *measured)
    return copy.deepcopy(context.memo.once(key, lambda: measure(evaluator, base.loaded.model)))  # the run may change it


def kept_files(name: str, which: str) -> str:
    """The name of the files of a kept set, without ending. which: base or tuned."""
    return f"keep/{name}_{which}"


def read_base_measurement(run: Run, name: str = "base") -> Measurement | None:
    """What a resumed run has measured before; None if it has not. name: of its files, see `kept_files`."""
    if not (run / f"{name}.json").is_file():
        return None
    stored = run.read_json(f"{name}.json")
    answers = cast("list[AnswerRecord]", read_jsonl(run / "eval" / f"{name}.jsonl"))
    return Measurement(stored["loss"], stored["metrics"], answers)


def write_base_measurement(run: Run, measured: Measurement, name: str = "base") -> None:
    run.write_lines(f"eval/{name}.jsonl", measured.answers)
    run.write_json(f"{name}.json", {"loss": measured.loss, "metrics": measured.metrics})
