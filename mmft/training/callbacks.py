"""Callbacks of the Trainer: logs, sample answers, progress, signals, non-finite steps, the end of an epoch."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import Preempted, UserError
from ..evaluation.evaluate import Evaluator
from ..loggers.base import Logger
from ..runs.directory import Run
from ..system.console import shows_progress
from ..system.distributed import share, world_size
from ..system.signals import Listener
from .run_trainer import RunTrainer
from .source_meter import SourceMeter
from .trainer import JointMember

log = logging.getLogger("mmft")


class Recorder(TrainerCallback):
    """Write every logged value to metrics.jsonl and to the logger."""

    def __init__(self, run: Run, logger: Logger):
        self.run, self.logger = run, logger
        self.first_step_at: float | None = None  # time at which the first step was done

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.first_step_at = self.first_step_at or time.time()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        values = {k: v for k, v in (logs or {}).items() if isinstance(v, (int, float)) and math.isfinite(v)}
        values.pop("epoch", None)
        row = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 6), "seconds": round(self.run.seconds, 3), **values}
        self.run.append_line("metrics.jsonl", row)
        self.logger.scalars(state.global_step, values)


class SampleAnswers(TrainerCallback):
    """Generate the answers to a few held-out rows every `steps` steps."""

    def __init__(self, run: Run, logger: Logger, evaluator: Evaluator, count: int, steps: int | None):
        self.run, self.logger, self.evaluator, self.steps = run, logger, evaluator, steps
        self.rows = [evaluator.rows[i] for i in range(min(count, len(evaluator.rows)))]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any) -> None:
        if self.steps and self.rows and state.global_step % self.steps == 0:
            texts = self.evaluator.generate(model, self.rows)
            records = [self.evaluator.record(i, row, text) for i, (row, text) in enumerate(zip(self.rows, texts, strict=True))]
            self.run.append_line("eval/samples.jsonl", {"step": state.global_step, "samples": records})
            self.logger.samples(state.global_step, records, tag="training")


class TrialReporter(Protocol):
    """How a run that is a trial of a search reports its evaluations."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises Pruned if the search ends this trial."""
        ...


class ReportTrial(TrainerCallback):
    """Report each evaluation to the search. Raises Pruned, in every process, if the search ends the trial."""

    def __init__(self, reporter: TrialReporter):
        self.reporter = reporter

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Mapping[str, float] | None = None, **kwargs: Any) -> None:
        share(lambda: self.reporter.report(state.global_step, metrics or {}))


class Progress(ProgressCallback):
    """A progress bar with the last values on a terminal; elsewhere one line for each log."""

    SHOWN = {"reward": "reward", "loss": "loss", "eval_loss": "eval loss", "eval_exact_match": "exact match", "learning_rate": "lr", "grad_norm": "|grad|"}

    def __init__(self, member: JointMember | None = None):
        super().__init__()
        self.member = member  # jointly trained runs share one line
        self.on_terminal = shows_progress() and member is None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.began = time.time()
        if self.on_terminal:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.on_terminal:
            super().on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.on_terminal:
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        values = {name: f"{logs[key]:.4g}" for key, name in self.SHOWN.items() if logs and isinstance(logs.get(key), (int, float))}
        if not values or not state.is_world_process_zero:
            return
        if self.on_terminal:
            if self.training_bar is not None:
                self.training_bar.set_postfix(values)
            return
        left = (time.time() - self.began) / max(state.global_step, 1) * (state.max_steps - state.global_step)
        words = "  ".join(f"{name} {value}" for name, value in values.items())
        line = f"step {state.global_step:{len(str(state.max_steps))}d}/{state.max_steps}  {words}  {clock(left)} left"
        log.info(line, extra={"kept": self.member is not None})
        if self.member is not None and "loss" in values:
            self.member.log_step(state.global_step, state.max_steps, values["loss"], clock(left))


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class StopOnSignal(TrainerCallback):
    """After the step in which a signal came, save a checkpoint and raise Preempted.

    An exception, because should_training_stop would also do what is due at the end of an epoch, in the middle of one. `EndAfterSave`
    raises it, because it must come after the checkpoint was published.
    """

    def __init__(self, listener: Listener):
        self.listener, self.stopping = listener, False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _in_any_process(self.listener.heard is not None, args.device):
            self.stopping = control.should_save = True


class EndAfterSave(TrainerCallback):
    """Raise Preempted once the checkpoint that `stop` asked for is published. Must be the last callback."""

    def __init__(self, stop: StopOnSignal, run: Run):
        self.stop, self.run = stop, run

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.stop.stopping:
            raise Preempted(f"{self.run.path}: stopped after step {state.global_step}; the same command, or mmft resume run={self.run.path}, goes on")


def _in_any_process(here: bool, device: torch.device) -> bool:
    """Whether a signal reached any of the processes that train one model: all stop after the same step."""
    if world_size() == 1:
        return here
    import torch.distributed as dist

    flag = torch.tensor(float(here), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class SaveAtEpochEnd(TrainerCallback):
    """Save a checkpoint that falls on the last step of an epoch after what is due at the end of the epoch.

    A resumed Trainer begins with the next epoch: a checkpoint between the step and the end of its epoch would lose that evaluation and
    that log. With save_strategy=best the evaluation decides about the checkpoint, so it moves too. Must be the last callback that
    changes the control at a step's end.
    """

    def __init__(self) -> None:
        self.save = self.evaluate = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not (state.epoch == int(state.epoch or 0.0) or control.should_training_stop or control.should_epoch_stop):
            return
        self.save, control.should_save = control.should_save, False
        if args.save_strategy == "best":
            self.evaluate, control.should_evaluate = control.should_evaluate, False

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        control.should_save |= self.save
        control.should_evaluate |= self.evaluate
        self.save = self.evaluate = False


class FollowsEpoch(Protocol):
    """What draws anew in every epoch."""

    epoch: int


class SetEpoch(TrainerCallback):
    """Tell augmented rows and the sampler which epoch is trained, also in a resumed run."""

    def __init__(self, targets: Sequence[FollowsEpoch]):
        self.targets, self.next_epoch = targets, 0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, train_dataloader: Any = None, **kwargs: Any) -> None:
        steps_per_epoch = max(math.ceil(len(train_dataloader) / args.gradient_accumulation_steps), 1)
        self.next_epoch = state.global_step // steps_per_epoch

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        for target in self.targets:
            target.epoch = self.next_epoch
        self.next_epoch += 1


class FiniteStep(TrainerCallback):
    """Before the optimizer step, if a loss or a gradient is NaN or infinite: stop, or skip the step, up to a limit.

    mode: "stop" or "skip". limit: steps that may be skipped in all.
    """

    def __init__(self, trainer: RunTrainer, mode: str, limit: int):
        if mode not in ("stop", "skip"):
            raise UserError(f"trainer.nonfinite={mode}: must be stop or skip")
        self.trainer, self.mode, self.limit = trainer, mode, limit
        self.before: tuple[torch.Tensor, torch.Tensor, SourceMeter | None] | None = None  # loss, supervised tokens and sources before the current step
        self.skipped = False  # whether the current step was skipped

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        meter = self.trainer.meter
        self.before = meter.loss.clone(), torch.as_tensor(meter.supervised_tokens).clone(), copy.deepcopy(meter.sources)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        trainer = self.trainer
        losses = torch.stack([loss.float() for loss in trainer.losses]) if trainer.losses else torch.zeros(0)
        rows, trainer.losses, trainer.row_ids = trainer.row_ids, [], []
        fp16 = trainer.accelerator.scaler is not None  # a loss scaler meets infinite gradients by design and skips them
        gradients = [] if fp16 else [p.grad for p in trainer.trained if p.grad is not None]
        bad_loss = not bool(torch.isfinite(losses).all())
        bad_gradient = bool(gradients) and not bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))
        if not (bad_loss or bad_gradient):
            trainer.phase = "update"
            return
        what = f"step {state.global_step + 1}: the {'loss' if bad_loss else 'gradient'} is not finite (losses {[round(x, 4) for x in losses.tolist()]})"
        named = f"rows {', '.join(rows[:16])}"
        meter = trainer.meter
        if self.mode == "skip" and meter.skipped < self.limit and self.before is not None:
            meter.skipped += 1
            self.skipped = True
            meter.loss = self.before[0]  # a skipped step counts in no mean
            if meter.sources is not None and self.before[2] is not None:
                meter.sources.window = self.before[2].window
            trainer.model.zero_grad(set_to_none=True)  # an optimizer leaves a parameter without a gradient unchanged
            log.warning("%-14s %s, %s; left out, %d of at most %d", "skipped", what, named, meter.skipped, self.limit)
            return
        over = f" after {meter.skipped} steps that were left out (trainer.nonfinite_limit)" if self.mode == "skip" else ""
        raise UserError(
            f"{what}{over}, {named}; the weights of step {state.global_step} are untouched."
            " Try a lower trainer.learning_rate, model.dtype=fp32, or look at these rows"
        )

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.phase = "step"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.meter.steps += not self.skipped
        self.before, self.skipped = None, False

    def forget_step(self) -> None:
        """Take the loss and the tokens of an unfinished step out of the meter."""
        if self.before is not None:
            self.trainer.meter.loss, self.trainer.meter.supervised_tokens, self.trainer.meter.sources = self.before
