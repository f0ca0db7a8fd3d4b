"""The steps of one training: the Trainer and its callbacks made, run to the end, made anew when a device has too little memory."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from transformers import PrinterCallback, ProgressCallback

from ..common.errors import UserError
from ..models.device import mixed_precision
from ..sweeps.optuna_study import is_point
from ..system import memory
from . import checkpoints
from .accumulation import folded
from .callbacks import Progress, Pruning, Recorder, Samples, StopAfterStep
from .trainer import SupervisedTrainer, training_settings

log = logging.getLogger("mmft")


class Steps:
    """`run` trains a Line's model; `trainer` is the Trainer that ended it, `first` when the first step was done."""

    def __init__(self, line: Any, seat: Any):
        self.line, self.seat = line, seat
        self.trainer: Any = None
        self.first: float | None = None
        self.seconds = 0.0  # in the Trainer's loop, here
        loaded, given = line.loaded, line.settings["trainer"]
        self.settings = {**mixed_precision(loaded.dtype, loaded.device, line.plan.method == "full"), **given}
        if line.cache is not None:
            self.settings |= {"dataloader_num_workers": 0}  # nothing is left for workers to do
        self.settings.setdefault("use_cpu", loaded.device == "cpu")
        self.checkpoint = line.resumed.checkpoint if line.resumed else None

    @property
    def samples(self) -> int:
        """Rows seen in all parts of the run; the last step of an epoch may have had fewer than counted here."""
        return self.line.summary["steps"] * self.line.summary["effective_batch_size"]

    def run(self) -> None:
        """Train to the end. Errors raised: Preempted after a signal, with a checkpoint; UserError."""
        merged = folded(self.settings, self.line.model, self.line.collator, self.line.rows, together=self.seat is not None)
        micro = None
        if merged > 1:
            micro = self.settings["per_device_train_batch_size"]
            self.settings |= {"per_device_train_batch_size": micro * merged, "gradient_accumulation_steps": 1}
            log.info("%-14s the %d micro-batches of a step are computed as one", "batch", merged)
        self.line.summary["micro_batches_folded"] = merged
        while True:
            self.trainer, recorder = self._made(micro)
            listener = self.line.listener
            began = time.time()
            try:
                listener.stepping += 1
                self.trainer.train(resume_from_checkpoint=str(self.checkpoint) if self.checkpoint else None)
                ended = True
            except Exception as error:
                ended = False
                if not memory.is_out(error):
                    raise
            finally:
                listener.stepping -= 1
                self.seconds += time.time() - began
                self._note()
            if ended:
                self.first = recorder.first_step
                return
            self._halve()  # out here, where the error no longer holds what the step had computed
            self.trainer = None  # its optimizer's state lies in the checkpoint

    def _note(self) -> None:
        """What the summary tells, however training ended."""
        trainer = self.trainer
        history = [h["loss"] for h in trainer.state.log_history if math.isfinite(h.get("loss", math.nan))]
        args = trainer.args
        self.line.summary |= {
            "steps": trainer.state.global_step,
            "train_loss": {"first": history[0] if history else None, "last": history[-1] if history else None},
            "effective_batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "skipped_steps": trainer.skipped,
        }

    def _made(self, micro: int | None) -> tuple[SupervisedTrainer, Recorder]:
        line = self.line
        seed, evaluation = line.settings["seed"], line.settings["evaluation"]
        args, callbacks = training_settings(
            dict(self.settings), output_dir=str(line.run / "checkpoints"), seed=seed, data_seed=seed, report_to=[], remove_unused_columns=False,
            label_names=["labels"],
        )  # fmt: skip
        recorder = Recorder(line.run, line.logger)
        callbacks += [recorder, StopAfterStep(line.listener, line.run)]
        if is_point(line.run.path):
            callbacks.append(Pruning(line.run, line.settings["objective"], line.summary))
        if line.held_out is not None:
            callbacks.append(Samples(line.run, line.logger, line.evaluator, evaluation["samples"], evaluation["sample_steps"]))
        trainer = SupervisedTrainer(
            model=line.model,
            args=args,
            train_dataset=line.rows,
            eval_dataset=line.held_out,
            data_collator=line.collator,
            processing_class=line.loaded.processor,
            callbacks=callbacks,
            evaluator=getattr(line, "evaluator", None),
            generate=evaluation["generate"],
            seat=self.seat,
            folded=micro,
            run=line.run,
            checkpoint=self.checkpoint,
            nonfinite=(self.settings.get("nonfinite") or "stop", self.settings.get("nonfinite_limit") or 0),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            trainer.add_callback(Progress(self.seat))
        return trainer, recorder

    def _halve(self) -> None:
        """Half the micro-batch, twice as many of them: the same rows a step, and the step that failed is computed again.

        Errors raised: UserError where there is no half.
        """
        size, accumulate = self.settings["per_device_train_batch_size"], self.settings.get("gradient_accumulation_steps") or 1
        trainer, step = self.trainer, self.trainer.state.global_step
        trainer.model.zero_grad(set_to_none=True)
        made = step - (int(self.checkpoint.name.removeprefix(checkpoints.PREFIX)) if self.checkpoint else 0)  # steps of this Trainer's own
        if trainer.doing == "update":  # half of the weights may be those of the next step: nothing to go on from but what was saved
            raise UserError(
                f"out of memory in the update of step {step + 1}: a smaller micro-batch would not help; try trainer.optim=adamw_bnb_8bit or a smaller lora.r"
                " (mmft resume goes on from the newest checkpoint)"
            )
        if trainer.doing == "measure":
            raise UserError(f"out of memory while measuring after step {step}: try a smaller trainer.per_device_eval_batch_size or evaluation.batch_size")
        if size % 2 or self.seat is not None:
            raise UserError(f"out of memory with {size} rows a micro-batch: try {memory.SMALLER}" + (", or hydra/launcher=basic" if self.seat is not None else ""))
        if trainer.before is not None:
            trainer._tr_loss, trainer.supervised_tokens = trainer.before
        memory.freed()
        if made and trainer.begun:  # the weights are those of the last finished step: go on from them
            trainer._save_checkpoint(trainer.model, None)
            self.checkpoint = checkpoints.newest(self.line.run / "checkpoints")
            self.seconds = 0.0  # the checkpoint has counted them
        self.settings |= {"per_device_train_batch_size": size // 2, "gradient_accumulation_steps": accumulate * 2}
        log.warning("%-14s out of memory at step %d: micro-batches of %d rows from here on, %d a step", "memory", step + 1, size // 2, accumulate * 2)
        self.line.summary.setdefault("out_of_memory", []).append({"step": step + 1, "per_device_train_batch_size": size // 2, "gradient_accumulation_steps": accumulate * 2})
