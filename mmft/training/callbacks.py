"""What happens beside the steps: metrics.jsonl, the logger, sample answers while training, the progress shown."""

from __future__ import annotations

import logging
import math
import sys
import time
from typing import Any

from transformers import ProgressCallback, TrainerCallback

from ..common.errors import Preempted
from ..evaluation.evaluate import Evaluator
from ..runs.directory import Run
from ..sweeps.optuna_study import Reporter
from ..system.distributed import is_main, share, world_size
from ..system.signals import Listener

log = logging.getLogger("mmft")


class Recorder(TrainerCallback):
    """Writes every logged value to metrics.jsonl and hands it to the logger."""

    def __init__(self, run: Run, logger: Any):
        self.run, self.logger = run, logger
        self.first_step: float | None = None  # when it was done

    def on_step_end(self, args, state, control, **kwargs):
        self.first_step = self.first_step or time.time()

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


class Pruning(TrainerCallback):
    """Reports each evaluation to the search that this run is a point of; ends the run when the search gives it up.

    Errors raised: Pruned, in every process.
    """

    def __init__(self, run: Run, objective: str, summary: dict[str, Any]):
        self.summary = summary
        self.reporter = Reporter(run.path, objective) if is_main() else None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.summary |= {"steps": state.global_step, **({"eval_loss": metrics["eval_loss"]} if "eval_loss" in metrics else {})}
        share(lambda: self.reporter.report(state.global_step, metrics))


class Progress(ProgressCallback):
    """A bar with the time left and the last values on a terminal; one plain line for each log elsewhere."""

    SHOWN = {"loss": "loss", "eval_loss": "eval loss", "eval_exact_match": "exact match", "learning_rate": "lr", "grad_norm": "|grad|"}

    def __init__(self, seat: Any = None):
        super().__init__()
        self.seat = seat  # of a point trained in step with others: their lines are one
        self.terminal = sys.stderr.isatty() and seat is None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.time()
        if self.terminal:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        if self.terminal:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        if self.terminal:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        values = {name: f"{logs[key]:.4g}" for key, name in self.SHOWN.items() if isinstance((logs or {}).get(key), (int, float))}
        if not values or not state.is_world_process_zero:
            return
        if self.terminal:
            if self.training_bar is not None:
                self.training_bar.set_postfix(values)
            return
        left = (time.time() - self.began) / max(state.global_step, 1) * (state.max_steps - state.global_step)
        words = "  ".join(f"{name} {value}" for name, value in values.items())
        line = f"step {state.global_step:{len(str(state.max_steps))}d}/{state.max_steps}  {words}  {clock(left)} left"
        log.info(line, extra={"kept": self.seat is not None})
        if self.seat is not None and "loss" in values:
            self.seat.say(state.global_step, state.max_steps, values["loss"], clock(left))


def clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StopAfterStep(TrainerCallback):
    """After the step in which a signal came: what was due at it, a checkpoint, then Preempted.

    By an exception, not by should_training_stop: that would do what is due at the end of an epoch in the middle of one.
    """

    def __init__(self, listener: Listener, run: Any):
        self.listener, self.run, self.stopping = listener, run, False

    def on_step_end(self, args, state, control, **kwargs):
        if _any_process(self.listener.heard is not None, args.device):
            self.stopping = control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        if self.stopping:
            raise Preempted(f"{self.run.path}: stopped after step {state.global_step}; the same command, or mmft resume run={self.run.path}, goes on")


def _any_process(here: bool, device: Any) -> bool:
    """Whether a signal reached any of the processes that train one model: they stop after the same step."""
    if world_size() == 1:
        return here
    import torch
    import torch.distributed as dist

    flag = torch.tensor(float(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)
