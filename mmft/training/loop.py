"""Run the Trainer to the end of training, with smaller micro-batches after an out-of-memory error."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState, TrainingArguments

from ..collators.base import Collator
from ..collators.types import BatchMaker
from ..common.errors import UserError
from ..common.private_api import load_checkpoint_weights, save_checkpoint
from ..common.records import OutOfMemoryEvent, Summary
from ..config.choices import PREFERENCE_SCORES
from ..config.settings import Settings
from ..data.augment import Augmented
from ..data.mixing import Mixing
from ..evaluation.evaluate import Evaluator
from ..evaluation.preferences import PreferenceEvaluator
from ..evaluation.rewards import Reward
from ..loggers.base import Logger
from ..losses.objectives import Objective
from ..losses.packing import Packing
from ..losses.policy import Grpo
from ..models.device import mixed_precision
from ..models.load import Loaded
from ..rewrites.apply import Rewrites
from ..rewrites.row_attention import NAME as ROW_ATTENTION
from ..runs.directory import Run
from ..runs.parents import extended
from ..system.distributed import total
from ..system.memory import ADVICE, is_out_of_memory, release_memory
from ..system.signals import Listener
from . import checkpoints
from .accumulation import merged_micro_batches
from .arguments import training_settings
from .callbacks import (
    EndAfterSave,
    FiniteStep,
    Progress,
    Recorder,
    ReportTrial,
    SampleAnswers,
    SaveAtEpochEnd,
    SetEpoch,
    StopOnSignal,
    TrialReporter,
)  # fmt: skip
from .checkpoint_writer import CheckpointWriter, RestoreState
from .compiled import why_not_compiled
from .device_defaults import Machine, describe_device, loader_defaults
from .ema import Average
from .run_trainer import RowSampler, RunTrainer
from .sampling import LengthGroupedSampler, MixtureSampler
from .token_batches import BatchedRows, BatchOfRows, RowSizes, TokenBatchSampler
from .trainer import JointMember, SupervisedTrainer

log = logging.getLogger("mmft")


@dataclass
class Policy:
    """Answers are sampled and rewarded in training. longest: tokens of an answer, where the objective's max_completion_length is auto."""

    objective: Grpo
    rewards: list[Reward]
    longest: int | None


@dataclass
class TrainingJob:
    """What is trained, on what, and where it is written.

    mixing: of a mix, the draws from its sources. full: the whole model is trained. cached: batches come from the feature cache, so data workers have nothing to do. checkpoint: where
    a resumed run goes on. member: the place in a group of jointly trained runs. reporter: of a run that is a trial of a search. sharers:
    processes that share the machine's memory. objective: for preferences, None for cross entropy; preferences: measures them. policy: for rewards.
    """

    run: Run
    logger: Logger
    settings: Settings
    loaded: Loaded
    model: Any
    rewrites: Rewrites
    full: bool
    collator: BatchMaker
    rows: Sequence[Any]
    sizes: RowSizes
    held_out: Sequence[Any] | None
    evaluator: Evaluator | None
    listener: Listener
    mixing: Mixing | None = None
    cached: bool = False
    checkpoint: Path | None = None
    member: JointMember | None = None
    reporter: TrialReporter | None = None
    sharers: int = 1
    objective: Objective | None = None
    preferences: PreferenceEvaluator | None = None
    policy: Policy | None = None


@dataclass
class _Attempt:
    """One Trainer with the callbacks that are asked afterwards."""

    trainer: RunTrainer
    recorder: Recorder
    restore: RestoreState
    finite: FiniteStep
    writer: CheckpointWriter


class TrainingLoop:
    """Trains a job. `facts` may be asked however training ended."""

    def __init__(self, job: TrainingJob):
        self.job = job
        given = job.settings["trainer"]
        machine = Machine.here(job.loaded.device)
        loader, note = loader_defaults(given, machine, job.cached)
        self.arguments = {**mixed_precision(job.loaded.dtype, job.loaded.device, job.full), **given, **loader}
        for text in (note, describe_device(given, machine, self.arguments)):
            if text is not None:
                log.info("%-14s %s", "device", text)
        self.arguments.setdefault("use_cpu", job.loaded.device == "cpu")
        self.checkpoint = job.checkpoint
        self.seconds = 0.0  # in the Trainer's loop, of all parts of the run
        self.first_step_at: float | None = None
        self.events: list[OutOfMemoryEvent] = []
        self.merged = 1
        self.trainer: RunTrainer | None = None
        self._progress: Summary = {}

    def run(self) -> None:
        """Train to the end. Raises Preempted after a signal, once a checkpoint is saved; UserError."""
        merged_rows = self._merge_micro_batches()
        if self.checkpoint is not None and checkpoints.read_state(self.checkpoint)["done"]:
            self._finish_from(self.checkpoint, merged_rows)
            return
        while True:
            attempt = self._attempt(merged_rows)
            self.trainer = trainer = attempt.trainer
            began, ended = time.time(), False
            try:
                self.job.listener.running += 1
                trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                ended = True
            except Exception as error:
                if isinstance(error, OSError) and attempt.writer.is_saving():
                    raise attempt.writer.write_error(error) from None
                if (why := why_not_compiled(error)) is not None:
                    raise UserError(f"trainer.torch_compile=true: torch cannot compile this model's layers: {why}; leave it out") from None
                if not is_out_of_memory(error):
                    raise
            finally:
                self.job.listener.running -= 1
                self.seconds += time.time() - began
                self._note(trainer)
                trainer.release()
                shutil.rmtree(attempt.writer.home / checkpoints.SAVING, ignore_errors=True)
            if ended:
                self.first_step_at = attempt.recorder.first_step_at
                if self.job.policy is not None and not any(h.get("frac_reward_zero_std", 1.0) < 1 for h in trainer.state.log_history):
                    log.warning("%-14s all sampled answers had the same reward, so nothing was learned: train the form of the answers first (lora.start=RUN), or reward a part of it", "reward")
                self.seconds += trainer.meter.earlier_seconds
                return
            self._halve(attempt)  # outside the handler, where the error no longer holds the tensors of the step
            self.trainer = None  # its optimizer's state is in the checkpoint
            del attempt, trainer

    def facts(self) -> Summary:
        """What summary.json says about training."""
        facts: Summary = {**self._progress, "micro_batches_folded": self.merged}
        if self.events:
            facts["out_of_memory"] = self.events
        return facts

    def finished_facts(self) -> Summary:
        """The same with speed and totals, once training has ended."""
        assert self.trainer is not None
        samples = self.trainer.samples_until(self._progress["steps"])
        return {
            **self.facts(),
            "samples_per_second": round(samples / max(self.seconds, 1e-9), 3),
            "trained_together": self.job.member.size if self.job.member else 1,  # time and memory are those of so many runs at once
            "supervised_tokens": int(total(self.trainer.meter.supervised_tokens)),
            **({"sources": self.trainer.meter.sources.facts()} if self.trainer.meter.sources is not None else {}),
        }

    def last_eval_loss(self) -> float | None:
        """The loss of the latest evaluation while training."""
        history = self.trainer.state.log_history if self.trainer else []
        return next((h["eval_loss"] for h in reversed(history) if "eval_loss" in h), None)

    def _merge_micro_batches(self) -> int | None:
        """Merge the micro-batches of a step where it pays; returns the rows of one of them, None if they stay apart."""
        job = self.job
        if job.policy is not None:
            return None
        if job.objective is not None:  # the cross entropy in ORPO and MPO and the estimate in KTO belong to a micro-batch
            return None
        packing, by_row = self._packing(), ROW_ATTENTION in job.rewrites.classes
        self.merged = merged_micro_batches(self.arguments, job.model, job.collator, job.rows, job.member is not None, job.sharers, packing, by_row)
        if self.merged == 1:
            return None
        rows: int = self.arguments["per_device_train_batch_size"]
        self.arguments |= {"per_device_train_batch_size": rows * self.merged, "gradient_accumulation_steps": 1}
        log.info("%-14s the %d micro-batches of a step are computed as one", "batch", self.merged)
        return rows

    def _packing(self) -> Packing | None:
        return Packing(self.job.model) if self.arguments.get("packing") else None

    def _attempt(self, merged_rows: int | None) -> _Attempt:
        """A new Trainer with its callbacks, in the order that they need."""
        job = self.job
        seed, evaluation, home = job.settings["seed"], job.settings["evaluation"], job.run / "checkpoints"
        limit = self.arguments.get("save_total_limit")
        args, callbacks = training_settings(
            {**self.arguments, "save_total_limit": None, **self._own_sampling(), **self._metric_direction()}, output_dir=str(home / checkpoints.SAVING), seed=seed, data_seed=seed, report_to=[],
            remove_unused_columns=False, label_names=["labels"], **self._policy_arguments(),
        )  # fmt: skip
        recorder, stop = Recorder(job.run, job.logger), StopOnSignal(job.listener)
        callbacks += [recorder, stop]
        if job.reporter is not None:
            callbacks.append(ReportTrial(job.reporter))
        if job.evaluator is not None:
            callbacks.append(SampleAnswers(job.run, job.logger, job.evaluator, evaluation["samples"], evaluation["sample_steps"]))
        sampler = self._sampler(args)
        by_tokens = isinstance(sampler, TokenBatchSampler)
        follows_epoch = [each for each in (job.rows, sampler) if isinstance(each, (Augmented, LengthGroupedSampler, MixtureSampler, TokenBatchSampler))]
        if follows_epoch:
            callbacks.append(SetEpoch(follows_epoch))
        trainer: RunTrainer = self._policy_trainer(job.policy, args, callbacks) if job.policy is not None else SupervisedTrainer(
            model=job.model, args=args, rows=BatchedRows(job.rows) if by_tokens else job.rows, held_out=job.held_out,
            collator=BatchOfRows(job.collator) if by_tokens else job.collator, processor=job.loaded.processor, callbacks=callbacks,
            rewrites=job.rewrites, sampler=sampler, sources=tuple(job.mixing.sizes) if job.mixing else (), evaluator=job.evaluator, generate=evaluation["generate"], member=job.member, merged_rows=merged_rows,
            packing=self._packing(), objective=job.objective, preferences=job.preferences, trainer=self.arguments,
        )  # fmt: skip
        finite = FiniteStep(trainer, self.arguments.get("nonfinite") or "stop", self.arguments.get("nonfinite_limit") or 0)
        average = Average(job.model, float(self.arguments["ema_decay"]), self.checkpoint) if self.arguments.get("ema_decay") else None
        restore, writer = RestoreState(trainer, self.checkpoint, (extended(job.run) or {}).get("steps")), CheckpointWriter(trainer, job.run, limit, average)
        last: list[TrainerCallback] = [finite, restore, *([average] if average is not None else []), SaveAtEpochEnd(), writer, EndAfterSave(stop, job.run)]
        for callback in last:
            trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            trainer.add_callback(Progress(job.member))
        return _Attempt(trainer, recorder, restore, finite, writer)

    def _policy_arguments(self) -> dict[str, Any]:
        """The class and further arguments of the Trainer for rewards; {} for any other."""
        if self.job.policy is None:
            return {}
        from trl import GRPOConfig

        own = {"bf16": bool(self.arguments.get("bf16")), "num_generations_eval": 1, "disable_dropout": True}
        return {"kind": GRPOConfig, **self.job.policy.objective.arguments(self.job.policy.longest), **own}

    def _policy_trainer(self, policy: Policy, args: TrainingArguments, callbacks: list[TrainerCallback]) -> RunTrainer:
        from .policy_trainer import PolicyTrainer

        job = self.job
        assert isinstance(job.collator, Collator)
        trainer = PolicyTrainer(
            model=job.model, args=args, rows=job.rows, held_out=job.held_out, collator=job.collator, processor=job.loaded.processor, rewards=policy.rewards,
            callbacks=callbacks, evaluator=job.evaluator, generate=job.settings["evaluation"]["generate"], trainer=self.arguments,
        )  # fmt: skip
        trainer.add_callback(SetEpoch([trainer.order]))
        return trainer

    def _metric_direction(self) -> dict[str, bool]:
        """greater_is_better for metric_for_best_model, if that is a metric whose lower values are better and the config does not set it."""
        name = str(self.arguments.get("metric_for_best_model") or "").removeprefix("eval_")
        scores = self.job.evaluator.metrics.scores if self.job.evaluator else []
        metric, _, source = name.partition("/")  # of one source of a mix: loss/chat
        lower = source and metric == "loss" or PREFERENCE_SCORES.get(name) is False or any(score.name == metric and not score.higher_is_better for score in scores)
        return {"greater_is_better": False} if lower and self.arguments.get("greater_is_better") is None else {}

    def _own_sampling(self) -> dict[str, Any]:
        """The Trainer's own grouping by length needs rows that are mappings; mmft's sampler takes its place.

        To the Trainer a batch that is filled by tokens is one sample, so that it counts steps and shares batches among processes as ever.
        """
        by_tokens = {"per_device_train_batch_size": 1} if self.arguments.get("tokens_per_batch") else {}
        return {"train_sampling_strategy": "random", **by_tokens} if self._groups_by_length() or by_tokens else {}

    def _groups_by_length(self) -> bool:
        return str(self.arguments.get("train_sampling_strategy")) == "group_by_length"

    def _sampler(self, args: TrainingArguments) -> RowSampler | None:
        seed, mixing = self.job.settings["seed"], self.job.mixing
        drawn = mixing if mixing is not None and not mixing.every_row_once else None
        if tokens := self.arguments.get("tokens_per_batch"):
            packed, accumulate = bool(self.arguments.get("packing")), args.gradient_accumulation_steps
            return TokenBatchSampler(self.job.sizes, tokens, seed, drawn, packed, args.world_size, accumulate)
        if self._groups_by_length():
            step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
            return LengthGroupedSampler(self.job.sizes.lengths, step, seed, drawn)
        return MixtureSampler(drawn, seed) if drawn is not None else None

    def _note(self, trainer: RunTrainer) -> None:
        history = [h["loss"] for h in trainer.state.log_history if math.isfinite(h.get("loss", math.nan))]
        rewards = [h["reward"] for h in trainer.state.log_history if isinstance(h.get("reward"), float)] if self.job.policy is not None else []
        self._progress = {
            "steps": trainer.state.global_step,
            "train_loss": {"first": history[0] if history else None, "last": history[-1] if history else None},
            "effective_batch_size": self._rows_of_a_step(trainer),
            "skipped_steps": trainer.meter.skipped,
            **({"reward": {"first": rewards[0], "last": rewards[-1]}} if rewards else {}),
        }

    def _rows_of_a_step(self, trainer: RunTrainer) -> int:
        """Rows of an optimizer step, of batches that are filled by tokens on average."""
        args, sampler = trainer.args, trainer.sampler
        if isinstance(sampler, TokenBatchSampler):
            return round(sampler.rows_per_epoch / sampler.steps_per_epoch)
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _finish_from(self, checkpoint: Path, merged_rows: int | None) -> None:
        """End a run that was stopped after its last step: nothing is trained, the weights and counts are those of the checkpoint."""
        attempt = self._attempt(merged_rows)
        self.trainer = trainer = attempt.trainer
        trainer.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        attempt.restore.on_train_begin(trainer.args, trainer.state, trainer.control)
        self.seconds = max(trainer.meter.earlier_seconds, 1e-9)
        self._note(trainer)
        steps = trainer.state.global_step
        trainer.log({  # the log that the Trainer writes after the last step
            "train_runtime": round(self.seconds, 4), "train_samples_per_second": round(trainer.samples_until(steps) / self.seconds, 3),
            "train_steps_per_second": round(steps / self.seconds, 3), "total_flos": trainer.state.total_flos, "train_loss": 0.0,
        })  # fmt: skip
        best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
        load_checkpoint_weights(trainer, Path(best) if best else checkpoint)
        if attempt.writer.average is not None:
            attempt.writer.average.begin()
            attempt.writer.average.use()
        trainer.release()
        shutil.rmtree(attempt.writer.home / checkpoints.SAVING, ignore_errors=True)

    def _halve(self, attempt: _Attempt) -> None:
        """Halve the micro-batch and double the accumulation: each step keeps its rows, and the failed step is computed again.

        Raises UserError if that cannot help.
        """
        if self.job.policy is not None:
            raise UserError(f"out of memory with {self.arguments['per_device_train_batch_size']} answers a micro-batch: try a smaller one with as many more"
                            f" trainer.gradient_accumulation_steps, a smaller objective.max_completion_length, or {ADVICE}")  # fmt: skip
        size, accumulate = self.arguments["per_device_train_batch_size"], self.arguments.get("gradient_accumulation_steps") or 1
        trainer, step, joint = attempt.trainer, attempt.trainer.state.global_step, self.job.member is not None
        trainer.model.zero_grad(set_to_none=True)
        made = step - (checkpoints.step_of(self.checkpoint) if self.checkpoint else 0)  # steps of this Trainer
        if trainer.phase == "update":  # half of the weights may be updated already: only the last checkpoint is safe
            raise UserError(
                f"out of memory in the update of step {step + 1}: a smaller micro-batch would not help; try trainer.optim=adamw_bnb_8bit or a smaller lora.r"
                " (mmft resume goes on from the newest checkpoint)"
            )
        if trainer.phase == "measure":
            raise UserError(f"out of memory while measuring after step {step}: try a smaller trainer.per_device_eval_batch_size or evaluation.batch_size")
        if tokens := self.arguments.get("tokens_per_batch"):
            raise UserError(f"out of memory in batches of at most {tokens} tokens: try a smaller trainer.tokens_per_batch, or {ADVICE}")
        if size % 2 or joint:
            raise UserError(f"out of memory with {size} rows a micro-batch: try {ADVICE}" + (", or hydra/launcher=basic" if joint else ""))
        attempt.finite.forget_step()
        release_memory()
        if made and attempt.restore.began:  # the weights are those of the last finished step: go on from them
            attempt.writer.check_space()
            save_checkpoint(trainer)
            attempt.writer.publish()
            self.checkpoint = checkpoints.newest(self.job.run / "checkpoints")
            self.seconds = 0.0  # the checkpoint has counted them
        self.arguments |= {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": accumulate * 2}
        log.warning("%-14s out of memory at step %d: micro-batches of %d rows from here on, %d a step", "memory", step + 1, size // 2, accumulate * 2)
        self.events.append({"step": step + 1, "per_device_train_batch_size": size // 2, "gradient_accumulation_steps": accumulate * 2})
