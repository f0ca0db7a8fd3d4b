"""TrainingArguments from the trainer group, and the callbacks of its early-stopping keys."""

from __future__ import annotations

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ..common.errors import UserError
from ..config.key_types import arguments
from ..config.library_keys import BY_DEVICE, COMPILE, OWN_TRAINER, training_arguments
from ..config.settings import Section
from ..system import startup
from ..system.distributed import world_size
from .accumulation import check_batches

PLAIN_OPTIMIZERS = ("adamw_torch", "sgd", "adafactor", "adagrad")  # first words of the optimizers that need no further package
# Older names of TrainingArguments that every supported release has, and what 5.2x calls them.
RENAMED = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}


def training_settings(trainer: Section, kind: type[TrainingArguments] = TrainingArguments, **managed: object) -> tuple[TrainingArguments, list[TrainerCallback]]:
    """(TrainingArguments, callbacks of the early-stopping keys). kind: the class of the arguments. managed: keys that mmft sets. Raises UserError."""
    import torch

    check_batches(trainer)
    known = training_arguments()
    values = arguments({k: v for k, v in trainer.items() if k not in (*OWN_TRAINER, *COMPILE) and not (k in BY_DEVICE and v is None)}, known)
    for old, new in RENAMED.items():
        if old in values and new in known:  # the value of the new name wins if both are given
            values = {new: values.pop(old), **values}
    patience = trainer.get("early_stopping_patience")
    if world_size() > 1 and not torch.cuda.is_available() and "use_cpu" not in values:
        managed = {"use_cpu": True, **managed}  # processes without a GPU find each other only if told so
    try:
        args = kind(**{**values, **managed})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())[:400]}") from None
    if args.fp16 and args.device.type == "cpu":  # the Trainer would compute in fp32 without a word
        raise UserError("trainer.fp16=true: needs a GPU; leave it out, model.dtype=... chooses the precision")
    if not args.optim.value.startswith(PLAIN_OPTIMIZERS):
        startup.with_bitsandbytes()
    if patience is None:
        return args, []
    if not args.load_best_model_at_end:
        raise UserError("trainer.early_stopping_patience needs trainer.load_best_model_at_end=true (and eval_strategy and save_strategy that match)")
    return args, [EarlyStoppingCallback(patience, trainer.get("early_stopping_threshold") or 0.0)]
