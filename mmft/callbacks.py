"""What happens beside the steps: metrics.jsonl, the logger, sample answers while training."""

from __future__ import annotations

import math
from typing import Any

from transformers import TrainerCallback

from .evaluation import Evaluator
from .run import Run


class Recorder(TrainerCallback):
    """Writes every logged value to metrics.jsonl and hands it to the logger."""

    def __init__(self, run: Run, logger: Any):
        self.run, self.logger = run, logger

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float)) and math.isfinite(v)}
        values.pop("epoch", None)
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), "seconds": round(self.run.seconds, 3), **values}
        self.run.append_line("metrics.jsonl", row)
        self.logger.scalars(state.global_step, values)


class Samples(TrainerCallback):
    """Generates the answers to a few held-out rows every `steps` steps."""

    def __init__(self, run: Run, logger: Any, evaluator: Evaluator, count: int, steps: int | None):
        self.run, self.logger, self.evaluator, self.steps = run, logger, evaluator, steps
        self.rows = [evaluator.rows[i] for i in range(min(count, len(evaluator.rows)))]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.steps and self.rows and state.global_step % self.steps == 0:
            texts = self.evaluator.generate(model, self.rows)
            records = [self.evaluator.record(i, row, text) for i, (row, text) in enumerate(zip(self.rows, texts, strict=True))]
            self.run.append_line("eval/samples.jsonl", {"step": state.global_step, "samples": records})
            self.logger.samples(state.global_step, records, tag="training")
