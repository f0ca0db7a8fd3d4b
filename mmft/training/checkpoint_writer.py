"""Publish the Trainer's checkpoints: check the disk, complete, seal, rename; and restore mmft's own state from one."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import UserError
from ..runs.directory import Run
from ..system.disk import megabytes
from ..system.distributed import total
from .checkpoints import (
    FORMAT,
    PREFIX,
    REPLACED,
    SAVING,
    CheckpointState,
    all_in,
    flushed,
    read_state,
    rotate,
    seal,
    step_of,
    sync,
    write_state,
)
from .disk_space import checkpoint_bytes
from .ema import Average
from .run_trainer import RunTrainer
from .source_meter import SourceState

log = logging.getLogger("mmft")


class CheckpointWriter(TrainerCallback):
    """Publish each checkpoint that the Trainer writes: complete it, seal it, rename it into place.

    The Trainer's output_dir is the staging folder `checkpoints/.saving`. limit: checkpoints that are kept, None for all. average: of the
    weights, which is saved with each checkpoint.
    """

    def __init__(self, trainer: RunTrainer, run: Run, limit: int | None, average: Average | None = None):
        self.trainer, self.run, self.home, self.limit, self.average = trainer, run, run / "checkpoints", limit, average

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save:
            self.check_space()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if control.should_save or args.save_strategy == "best":
            self.check_space()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.publish()

    def check_space(self) -> None:
        """Raises UserError if the disk lacks the bytes of the next checkpoint; earlier checkpoints stay as they are."""
        trainer, step = self.trainer, self.trainer.state.global_step
        if not trainer.args.should_save:
            return
        shutil.rmtree(self.home / SAVING, ignore_errors=True)
        (self.home / SAVING).mkdir(parents=True, exist_ok=True)
        need, free = checkpoint_bytes(trainer.model, trainer.optimizer, next(reversed(all_in(self.home)), None)), shutil.disk_usage(self.home).free
        if free < need:
            raise UserError(
                f"{self.home}: the checkpoint of step {step} needs {megabytes(need)} and {megabytes(free)} are free; earlier ones are untouched:"
                f" free some, and go on with mmft resume run={self.home.parent}"
            )

    def publish(self) -> None:
        """Add mmft's state to the staged checkpoint, seal it, rename it, remove old ones. Raises UserError if it cannot be written."""
        trainer, home, step = self.trainer, self.home, self.trainer.state.global_step
        staged, final = home / SAVING / f"{PREFIX}{step}", home / f"{PREFIX}{step}"
        tokens = int(total(trainer.meter.supervised_tokens))  # a sum over all processes
        sources = trainer.meter.sources.state() if trainer.meter.sources is not None else None
        rewards = torch.as_tensor(total(trainer.meter.rewards)).tolist()
        trainer.keep(staged)
        trainer.accelerator.wait_for_everyone()  # each process adds its random state
        best = _final_best(trainer.state, home)
        if best is not None:
            trainer.state.best_model_checkpoint = str(best)
        if not trainer.args.should_save:
            return
        try:
            (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, and it may hold a token
            if best is not None:
                trainer.state.save_to_json(str(staged / "trainer_state.json"))
            write_state(staged, self._state(tokens, sources, rewards))
            if self.average is not None:
                self.average.save(staged)
            seal(staged)
            old = home / f"{REPLACED}{step}"
            if final.exists():  # saved twice at one step: it may be the only one, so it stays until the new one is in its place
                shutil.rmtree(old, ignore_errors=True)
                os.replace(final, old)
            os.replace(staged, final)
            sync(home)
            shutil.rmtree(old, ignore_errors=True)
            rotate(home, final, self.limit, trainer.state.best_model_checkpoint)
        except OSError as error:
            raise self.write_error(error) from None

    def is_saving(self) -> bool:
        """Whether the checkpoint of the current step is staged and not yet published."""
        return (self.home / SAVING / f"{PREFIX}{self.trainer.state.global_step}").is_dir()

    def write_error(self, error: OSError) -> UserError:
        return UserError(
            f"{self.home}: the checkpoint of step {self.trainer.state.global_step} could not be written: {error.strerror or error}; earlier ones are untouched"
        )

    def _state(self, tokens: int, sources: SourceState | None, rewards: list[float]) -> CheckpointState:
        trainer = self.trainer
        done = trainer.state.global_step >= trainer.state.max_steps or trainer.control.should_training_stop
        files = flushed(self.run.path, ("metrics.jsonl", "eval/samples.jsonl"))
        return {"format": FORMAT, "seconds": self.run.seconds, "done": done, "files": files, "meter": trainer.meter.state(tokens, sources, rewards)}


class RestoreState(TrainerCallback):
    """Restore mmft's own state from a checkpoint, after the Trainer has restored its own. checkpoint: None for a new run.

    extended_at: the last step of the run that this one continues, or None.
    """

    def __init__(self, trainer: RunTrainer, checkpoint: Path | None, extended_at: int | None = None):
        self.trainer, self.checkpoint, self.extended_at = trainer, checkpoint, extended_at
        self.began = False  # whether training has begun, with everything restored

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.meter.started, self.trainer.meter.first_step, self.began = time.time(), state.global_step, True
        if self.checkpoint is None:
            return
        self.trainer.meter.restore(read_state(self.checkpoint)["meter"])
        self.trainer.go_on(self.checkpoint)
        if step_of(self.checkpoint) == self.extended_at:
            self._lengthen_schedule(args, state)
        for callback in self.trainer.callback_handler.callbacks:
            # transformers' own way would also restore the control, with what was due at the checkpoint's step
            if isinstance(callback, EarlyStoppingCallback) and "EarlyStoppingCallback" in state.stateful_callbacks:
                vars(callback).update(state.stateful_callbacks["EarlyStoppingCallback"]["attributes"])
        if state.best_global_step:  # by its number: the run may have been moved since
            best = self.checkpoint.parent / f"{PREFIX}{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None


    def _lengthen_schedule(self, args: TrainingArguments, state: TrainerState) -> None:
        """Go on at the rates that the schedule of the whole, longer training has at this step. Raises UserError if no step is left."""
        from torch.optim.lr_scheduler import LambdaLR

        scheduler, step = self.trainer.lr_scheduler, state.global_step
        if state.max_steps <= step:
            raise UserError(f"trainer.max_steps: the run has {step} steps already, and this would be {state.max_steps} in all; ask for more")
        name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if not isinstance(scheduler, LambdaLR):
            log.info("%-14s %s goes on from its own state", "schedule", name)
            return
        rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        scheduler.load_state_dict({**scheduler.state_dict(), "last_epoch": step, "_step_count": step + 1, "_last_lr": rates})
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        before = next((row["learning_rate"] for row in reversed(state.log_history or []) if "learning_rate" in row), None)
        ended = f"; the run that it continues ended at {before:.3g}" if before is not None else ""
        parts = [group.get("part") for group in scheduler.optimizer.param_groups]
        rate = rates[parts.index("language") if "language" in parts else 0]  # the one that is logged
        log.info("%-14s %s over all %d steps, so step %d has the rate %.3g%s", "schedule", name, state.max_steps, step + 1, rate, ended)


def _final_best(state: TrainerState, home: Path) -> Path | None:
    """The place of the best checkpoint; the Trainer knows it by its place in the staging folder."""
    if not state.best_global_step:
        return None
    folder = home / f"{PREFIX}{state.best_global_step}"
    return folder if folder.is_dir() or state.best_global_step == state.global_step else None


