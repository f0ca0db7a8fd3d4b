"""The thinnest subclass of Hugging Face's Trainer: the supervised loss, our evaluation, a stop before a non-finite step."""

from __future__ import annotations

import functools
import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from ..common.errors import UserError
from ..config.library_keys import OWN_TRAINER, training_arguments
from ..config.key_types import arguments
from ..data.augment import Augmented
from ..evaluation.evaluate import Evaluator
from ..losses.supervised import supervised_loss
from ..rewrites.instead import Ways, instead
from ..system import startup
from ..system.distributed import is_main, share, total, world_size
from . import checkpoints
from .accumulation import micro_batches

log = logging.getLogger("mmft")

PLAIN_OPTIMIZERS = ("adamw_torch", "sgd", "adafactor", "adagrad")  # how the names of those begin that torch or transformers have themselves
# TrainingArguments' older names that mmft's own yaml uses, since every supported release has them, and what 5.2x calls them.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class SupervisedTrainer(Trainer):
    """Trainer whose loss is the mean over supervised tokens of the whole (accumulated, distributed) batch."""

    def __init__(
        self, *args: Any, evaluator: Evaluator | None, generate: bool, seat: Any = None, folded: int | None = None, run: Any = None,
        checkpoint: Any = None, nonfinite: tuple[str, int] = ("stop", 0), **kwargs: Any,
    ):  # fmt: skip
        super().__init__(*args, **kwargs)
        self.run, self.staging = run, None
        self.before: Any = None  # loss and tokens of the finished steps alone, while one is being made
        self.begun = False  # whether what a checkpoint kept is back in its place
        self.doing = "step"  # or "update", "measure": what memory may run out in
        self.skipped = 0  # steps left out for a loss or a gradient that was not finite
        self.began, self.seconds_before = time.time(), 0.0  # of training; what earlier parts of the run took
        self.epoch_ended = False  # whether what is due at an epoch's end has been done at this step
        self.epoch_open = self.done = False  # of a checkpoint that is gone on from: that is still to do; there is no step left
        self.last: tuple[Any, float | None] = (None, None)  # gradient norm and learning rate of the last step
        self.folded = folded  # rows of one of the micro-batches that are computed as one (mmft/training/accumulation.py)
        self.seat = seat  # in a group that is trained together (joint/group.py)
        self.evaluator, self.generate = evaluator, generate
        self.model_accepts_loss_kwargs = True  # have the Trainer count supervised tokens over the accumulated batch
        self.loss_is_scaled_for_ga = True  # the loss below is already divided by that count
        self.supervised_tokens = 0
        self.weights: int | None = None
        self.losses: list[Any] = []  # of the micro-batches since the last optimizer step
        self.row_ids: list[str] = []
        self.add_callback(FiniteStep(self, *nonfinite))
        self.add_callback(GoOn(self, checkpoint))

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        if isinstance(self.train_dataset, Augmented):
            self.train_dataset.follow(loader)
        return loader

    def training_step(self, model, inputs, num_items_in_batch=None):
        if (stream := getattr(self.model, "dropout_stream", None)) is not None:
            stream.at = (self.state.global_step, len(self.losses))
            stream.parts = micro_batches(inputs["attention_mask"], self.folded) if self.folded else []
        if self.seat is not None:
            return self._common_step(model, inputs, num_items_in_batch)
        with instead(self.ways):
            return super().training_step(model, inputs, num_items_in_batch)

    @property
    def ways(self) -> Ways:
        """What a pass for gradients calls in place of the library's own functions."""
        return [] if self.args.torch_compile else getattr(self.model, "ways", [])

    def _common_step(self, model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        """The same with one pass for all members of a group."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        self.row_ids += inputs.pop("row_ids", [])
        loss, count = self.seat.step(self, inputs, num_items_in_batch)
        self.supervised_tokens += count
        self.losses.append(loss)
        return loss

    def _clip_grad_norm(self, model):
        """Over what is trained, which is the same norm: a frozen weight has no gradient."""
        spread = self.is_fsdp_enabled or self.is_deepspeed_enabled  # there accelerate asks whose weights these are
        return super()._clip_grad_norm(model if spread else self.trained)

    @functools.cached_property
    def trained(self) -> torch.nn.ParameterList:
        """Looked for among the weights of all frozen modules once, not at every step."""
        return torch.nn.ParameterList(p for p in self.model.parameters() if p.requires_grad)

    def floating_point_ops(self, inputs):
        """transformers' own estimate, 6 x weights x tokens; the weights are counted once, not at every step."""
        if self.weights is None:
            self.weights = self.model.num_parameters(exclude_embeddings=True)
        return 6 * self.weights * inputs["input_ids"].numel()

    def scaled(self, loss: Any) -> Any:
        """The loss as its gradient is taken: fp16 gradients need a scale."""
        return loss if self.accelerator.scaler is None else self.accelerator.scaler.scale(loss)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.row_ids += inputs.pop("row_ids", [])
        loss, count = supervised_loss(model, inputs, self.args.label_smoothing_factor)
        items = count if num_items_in_batch is None else num_items_in_batch
        loss = loss / items
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradient is averaged over processes afterwards
        self.supervised_tokens += count.detach()
        self.losses.append(loss.detach())
        return loss

    def _save_checkpoint(self, model, trial):
        self.all_tokens = int(total(self.supervised_tokens))  # asked of every process, written by one
        checkpoints.save(self, lambda: super(SupervisedTrainer, self)._save_checkpoint(model, trial))

    def _get_output_dir(self, trial):
        return self.staging or super()._get_output_dir(trial)

    def own_state(self) -> dict[str, Any]:
        """What transformers does not save: the loss since the last log, what was counted, how long it took."""
        return {
            "seconds": self.run.seconds, "train_seconds": self.seconds_before + time.time() - self.began,
            "supervised_tokens": self.all_tokens, "skipped": self.skipped, "loss": self._tr_loss.item(),
            "total_loss": self._total_loss_scalar, "logged": self._globalstep_last_logged,
            "last": [float(x) if x is not None else None for x in self.last],
            "epoch_ended": self.epoch_ended, "done": self.state.global_step >= self.state.max_steps or self.control.should_training_stop,
            "files": checkpoints.flushed(self.run.path, ("metrics.jsonl", "eval/samples.jsonl")),
        }  # fmt: skip

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, learning_rate=None, **kwargs):
        self.last = (grad_norm, learning_rate)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, learning_rate=learning_rate, **kwargs)

    def _run_epoch(self, **kwargs):
        """Go on behind a checkpoint: transformers would forget what is due at the end of its epoch, and take a step too many behind the last."""
        if isinstance(self.train_dataset, Augmented):
            self.train_dataset.epoch = kwargs["epoch"]
        self._close_epoch()
        if self.done:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, trial, num_train_samples, start_time):
        self._close_epoch()
        return super()._finalize_training(trial, num_train_samples, start_time - self.seconds_before)

    def _close_epoch(self) -> None:
        if self.epoch_open:
            self.epoch_open, (norm, rate) = False, self.last
            self.control = self.callback_handler.on_epoch_end(self.args, self.state, self.control)
            super()._maybe_log_save_evaluate(self._tr_loss, norm, self.model, None, int(self.state.epoch), None, None, learning_rate=rate)
            self.done = self.done or self.control.should_training_stop

    def _load_best_model(self):
        if wrong := checkpoints.problem(Path(self.state.best_model_checkpoint)):
            raise UserError(f"{self.state.best_model_checkpoint}: the best checkpoint is damaged ({wrong}); mmft resume goes on without it, from an earlier one")
        super()._load_best_model()

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Token-weighted loss, and with `generate` the text metrics, on the held-out rows."""
        self.doing = "measure"
        # every process measures all rows: weights that are spread over processes are gathered in step, and it takes no longer
        metrics = {f"{metric_key_prefix}_loss": self.evaluator.loss(self.model)}
        if self.generate:
            values, _ = self.evaluator.measure(self.model)
            metrics |= {f"{metric_key_prefix}_{key}": value for key, value in values.items()}
        measured = metrics
        metrics = share(lambda: measured)  # a last digit that differs must not let one process stop early and another go on
        self.doing = "step"
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class FiniteStep(TrainerCallback):
    """Before the optimizer step, when a loss or a gradient of it is NaN or infinite: stops, or leaves the step out, up to a limit."""

    def __init__(self, trainer: SupervisedTrainer, mode: str, limit: int):
        if mode not in ("stop", "skip"):
            raise UserError(f"trainer.nonfinite={mode}: must be stop or skip")
        self.trainer, self.mode, self.limit = trainer, mode, limit

    def on_step_begin(self, args, state, control, **kwargs):
        # for a step that is left out or runs out of memory
        self.trainer.before = self.trainer._tr_loss.clone(), torch.as_tensor(self.trainer.supervised_tokens).clone()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.before = None

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.doing = "step"

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        losses = torch.stack([loss.float() for loss in trainer.losses]) if trainer.losses else None
        rows, trainer.losses, trainer.row_ids = trainer.row_ids, [], []
        fp16 = trainer.accelerator.scaler is not None  # a loss scaler meets infinite gradients by design and skips them
        gradients = [] if fp16 else [p.grad for p in trainer.trained if p.grad is not None]
        bad_loss = losses is not None and not torch.isfinite(losses).all()
        bad_gradient = bool(gradients) and not torch.isfinite(torch.stack([n.float() for n in torch._foreach_norm(gradients)])).all()
        if not (bad_loss or bad_gradient):
            trainer.doing = "update"
            return
        what = f"step {state.global_step + 1}: the {'loss' if bad_loss else 'gradient'} is not finite (losses {[round(x, 4) for x in losses.tolist()]})"
        named = f"rows {', '.join(rows[:16])}"
        if self.mode == "skip" and trainer.skipped < self.limit:
            trainer.skipped += 1
            trainer._tr_loss, _ = trainer.before  # a step that was not made counts in no mean
            trainer._globalstep_last_logged += 1
            trainer.model.zero_grad(set_to_none=True)  # an optimizer leaves a weight without a gradient as it is
            log.warning("%-14s %s, %s; left out, %d of at most %d", "skipped", what, named, trainer.skipped, self.limit)
            return
        over = f" after {trainer.skipped} steps that were left out (trainer.nonfinite_limit)" if self.mode == "skip" else ""
        raise UserError(
            f"{what}{over}, {named}; the weights of step {state.global_step} are untouched."
            " Try a lower trainer.learning_rate, model.dtype=fp32, or look at these rows"
        )


class GoOn(TrainerCallback):
    """Puts back what `own_state` kept, once transformers has set up everything else."""

    def __init__(self, trainer: SupervisedTrainer, checkpoint: Any):
        self.trainer, self.checkpoint = trainer, checkpoint

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.trainer.epoch_ended = False

    def on_epoch_end(self, args, state, control, **kwargs):
        self.trainer.epoch_ended = True

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.began, self.trainer.begun = time.time(), True
        if self.checkpoint is None:
            return
        kept = json.loads((self.checkpoint / checkpoints.STATE).read_text(encoding="utf-8"))
        trainer = self.trainer
        trainer._tr_loss = torch.tensor(kept["loss"], device=args.device)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = kept["total_loss"], kept["logged"]
        trainer.supervised_tokens, trainer.skipped = kept["supervised_tokens"] if is_main() else 0, kept["skipped"]
        trainer._initial_global_step, trainer.seconds_before = 0, kept["train_seconds"]  # loss and speed are those of the whole run
        trainer.last, trainer.done = tuple(kept["last"]), kept["done"]
        trainer.epoch_open = not kept["epoch_ended"] and (kept["done"] or state.epoch == int(state.epoch))
        for callback in trainer.callback_handler.callbacks:
            # transformers' own restoring of callbacks would bring back what was due at the checkpoint's step, too
            if isinstance(callback, EarlyStoppingCallback) and "EarlyStoppingCallback" in state.stateful_callbacks:
                vars(callback).update(state.stateful_callbacks["EarlyStoppingCallback"]["attributes"])
        if state.best_global_step:  # by its number: the run may have been moved since
            best = Path(args.output_dir) / f"{checkpoints.PREFIX}{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else None


def whole_weights(trainer: Trainer) -> dict[str, Any] | None:
    """The state dict of a model that FSDP or DeepSpeed spread over the processes; None where the model holds its own."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


def training_settings(trainer: dict[str, Any], **managed: Any) -> tuple[TrainingArguments, list[TrainerCallback]]:
    """TrainingArguments from the trainer group, and the callbacks its early-stopping keys ask for. Errors raised: UserError."""
    known = training_arguments()
    values = arguments({k: v for k, v in trainer.items() if k not in OWN_TRAINER}, known)
    for old, new in RENAMED.items():
        if old in values and new in known:  # the value of the new name wins when both are given
            values = {new: values.pop(old), **values}
    patience = trainer.get("early_stopping_patience")
    if world_size() > 1 and not torch.cuda.is_available() and "use_cpu" not in values:
        managed = {"use_cpu": True, **managed}  # several processes without a GPU find each other only when told
    try:
        args = TrainingArguments(**values, **managed)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())[:400]}") from None
    if not args.optim.value.startswith(PLAIN_OPTIMIZERS):
        startup.with_bitsandbytes()
    if patience is None:
        return args, []
    if not args.load_best_model_at_end:
        raise UserError("trainer.early_stopping_patience needs trainer.load_best_model_at_end=true (and eval_strategy and save_strategy that match)")
    return args, [EarlyStoppingCallback(patience, trainer.get("early_stopping_threshold") or 0.0)]
