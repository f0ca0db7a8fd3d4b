"""The thinnest subclass of Hugging Face's Trainer: the supervised loss, our evaluation, a stop before a non-finite step."""

from __future__ import annotations

from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from .config import arguments
from .distributed import share, world_size
from .errors import UserError
from .evaluation import Evaluator
from .fields import OWN_TRAINER, training_arguments
from .folding import micro_batches
from .objective import supervised_loss

# TrainingArguments' older names that mmft's own yaml uses, since every supported release has them, and what 5.2x calls them.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


class SupervisedTrainer(Trainer):
    """Trainer whose loss is the mean over supervised tokens of the whole (accumulated, distributed) batch."""

    def __init__(self, *args: Any, evaluator: Evaluator | None, generate: bool, seat: Any = None, folded: int | None = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.folded = folded  # rows of one of the micro-batches that are computed as one (mmft/folding.py)
        self.seat = seat  # in a group that is trained together (joint/group.py)
        self.evaluator, self.generate = evaluator, generate
        self.model_accepts_loss_kwargs = True  # have the Trainer count supervised tokens over the accumulated batch
        self.loss_is_scaled_for_ga = True  # the loss below is already divided by that count
        self.supervised_tokens = 0
        self.weights: int | None = None
        self.losses: list[Any] = []  # of the micro-batches since the last optimizer step
        self.row_ids: list[str] = []
        self.add_callback(FiniteStep(self))

    def training_step(self, model, inputs, num_items_in_batch=None):
        if (stream := getattr(self.model, "dropout_stream", None)) is not None:
            stream.at = (self.state.global_step, len(self.losses))
            stream.parts = micro_batches(inputs["attention_mask"], self.folded) if self.folded else []
        if self.seat is None:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        self.row_ids += inputs.pop("row_ids", [])
        loss, count = self.seat.step(self, inputs, num_items_in_batch)
        self.supervised_tokens += count
        self.losses.append(loss)
        return loss

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

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Token-weighted loss, and with `generate` the text metrics, on the held-out rows."""
        # every process measures all rows: weights that are spread over processes are gathered in step, and it takes no longer
        metrics = {f"{metric_key_prefix}_loss": self.evaluator.loss(self.model)}
        if self.generate:
            values, _ = self.evaluator.measure(self.model)
            metrics |= {f"{metric_key_prefix}_{key}": value for key, value in values.items()}
        measured = metrics
        metrics = share(lambda: measured)  # a last digit that differs must not let one process stop early and another go on
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class FiniteStep(TrainerCallback):
    """Stops before the optimizer step when a loss or a gradient of this step is NaN or infinite."""

    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer = self.trainer
        losses = torch.stack([loss.float() for loss in trainer.losses]) if trainer.losses else None
        rows, trainer.losses, trainer.row_ids = trainer.row_ids, [], []
        fp16 = trainer.accelerator.scaler is not None  # a loss scaler meets infinite gradients by design and skips them
        gradients = [] if fp16 else [p.grad for p in trainer.model.parameters() if p.grad is not None]
        bad_loss = losses is not None and not torch.isfinite(losses).all()
        bad_gradient = bool(gradients) and not torch.isfinite(torch.stack([n.float() for n in torch._foreach_norm(gradients)])).all()
        if bad_loss or bad_gradient:
            what = "loss" if bad_loss else "gradient"
            raise UserError(
                f"step {state.global_step + 1}: the {what} is not finite (losses {[round(x, 4) for x in losses.tolist()]}), rows "
                f"{', '.join(rows[:16])}; the weights of step {state.global_step} are untouched."
                " Try a lower trainer.learning_rate, model.dtype=fp32, or look at these rows"
            )


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
    if patience is None:
        return args, []
    if not args.load_best_model_at_end:
        raise UserError("trainer.early_stopping_patience needs trainer.load_best_model_at_end=true (and eval_strategy and save_strategy that match)")
    return args, [EarlyStoppingCallback(patience, trainer.get("early_stopping_threshold") or 0.0)]
