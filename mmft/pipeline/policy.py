"""What objective=grpo adds to a training: the keys that do not apply to it, which rows it can use, its rewards."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..config.library_keys import COMPILE
from ..config.settings import Section, Settings, sharded_by
from ..data.augment import describe_transforms
from ..data.mixing import Mixing
from ..evaluation.metrics.base import MetricSet
from ..evaluation.rewards import Reward, check_rewards, rewards_of
from ..losses.objectives import Objective
from ..losses.policy import Grpo
from ..system.distributed import world_size

if TYPE_CHECKING:
    from ..data.sample import Sample

log = logging.getLogger("mmft")

# keys of `trainer` -> why they do not apply; each is refused unless it has a value that leaves it out
NOT_APPLIED = {
    "packing": "answers are sampled and compared in groups, each a sequence of its own",
    "tokens_per_batch": "a batch is a number of groups of objective.num_generations answers",
    "label_smoothing_factor": "it smooths the cross entropy, which is not trained here",
    "neftune_noise_alpha": "answers would be sampled from a model with noise in its embeddings",
    "auto_find_batch_size": "a smaller batch would cut through a group of answers",
    **dict.fromkeys(COMPILE, "compiled layers were not tested with TRL's GRPOTrainer"),
    "use_liger_kernel": "TRL's GRPOTrainer computes the log-probabilities by a kernel of its own",
}


def check_policy_keys(objective: Objective, settings: Settings) -> None:
    """Refuse keys that do not apply to objective=grpo, before data and weights are read. Raises UserError, also where TRL is missing."""
    if not isinstance(objective, Grpo):
        return
    name, trainer = f"objective={objective.NAME}", settings["trainer"]
    if importlib.util.find_spec("trl") is None:
        raise UserError(f"{name} needs the package trl: pip install 'mmft[rl]'")
    for key, why in NOT_APPLIED.items():
        if trainer.get(key):
            raise UserError(f"{name}: trainer.{key}={trainer[key]} does not apply: {why}; leave it out")
    if trainer.get("fold_accumulation") == "always":
        raise UserError(f"{name}: trainer.fold_accumulation=always does not apply: the trainer computes each micro-batch by itself; leave it out")
    if (order := trainer.get("train_sampling_strategy")) not in (None, "random"):
        raise UserError(f"{name}: trainer.train_sampling_strategy={order} does not apply: prompts come in groups; objective.shuffle_dataset=false keeps the order of the data")
    if sharded := sharded_by(trainer):
        raise UserError(f"{name}: trainer.{sharded} is not supported with it; leave it out")
    if world_size() > 1:
        raise UserError(f"{name}: trains in one process; start it without torchrun or accelerate launch")
    if transforms := describe_transforms(settings.get("augment")):
        raise UserError(f"{name}: augment.{transforms.split('(')[0]} does not apply: the answers of a group must be to one and the same image; leave it out")
    if (cache := settings.get("vision_cache", "auto")) not in ("auto", "off"):
        raise UserError(f"{name}: vision_cache={cache} does not apply: TRL's GRPOTrainer hands pixels to the model; leave it out")
    if objective.beta and settings["lora"].get("r") is None:
        raise UserError(f"{name}: objective.beta={objective.beta} compares with the model before training, of which lora=none keeps no copy; use beta=0, or an adapter")
    if objective.beta and settings["lora"].get("bias") not in (None, "none"):
        raise UserError(f"{name}: objective.beta={objective.beta} compares with the adapter before training, and lora.bias={settings['lora']['bias']} trains weights outside it; leave it out")
    if dropout := settings["lora"].get("lora_dropout"):
        log.info("%-14s lora.lora_dropout=%s is not used: answers are sampled from the model whose probabilities are trained", "dropout", dropout)
        settings["lora"]["lora_dropout"] = 0.0
    _check_groups(objective, trainer)


def _check_groups(objective: Grpo, trainer: Section) -> None:
    """Raises UserError unless the answers that are sampled at once are whole groups."""
    size, steps = _sampled_at_once(objective, trainer)
    if (size * steps) % objective.num_generations:
        of = f"trainer.per_device_train_batch_size={size} x {'objective.steps_per_generation' if objective.steps_per_generation else 'trainer.gradient_accumulation_steps'}={steps}"
        raise UserError(f"objective.num_generations={objective.num_generations}: {of} = {size * steps} answers are sampled at once, which is no multiple of it")


def _sampled_at_once(objective: Grpo, trainer: Section) -> tuple[int, int]:
    """(answers of a micro-batch, micro-batches): the answers to all of them are sampled before the first is trained."""
    return trainer.get("per_device_train_batch_size", 8), objective.steps_per_generation or trainer.get("gradient_accumulation_steps") or 1


def policy_rewards(objective: Objective, metrics: MetricSet, rows: Sequence[Sample], mixing: Mixing | None, settings: Settings) -> list[Reward]:
    """The rewards of objective=grpo; [] for any other. Raises UserError for rows that it cannot use."""
    if not isinstance(objective, Grpo):
        return []
    if mixing is not None and not mixing.every_row_once:
        raise UserError("objective=grpo: takes every row of a mix once; leave out data.draws and the weights of data.sources")
    weighted = [row.id for row in (rows[i] for i in range(len(rows))) if row.weight != 1 or row.messages[-1].get("weight", 1.0) != 1]
    if weighted:
        raise UserError(f"objective=grpo: {len(weighted)} of {len(rows)} rows of train have a loss weight, e.g. {weighted[0]}; rewards of answers have none: leave out `weight`"
                        " (data.columns.weight, data.sources.NAME.loss_weight), or use objective=sft")  # fmt: skip
    rewards = rewards_of(objective.reward_funcs, metrics)
    check_rewards(rewards, rows)
    size, steps = _sampled_at_once(objective, settings["trainer"])
    prompts = size * steps // objective.num_generations
    if len(rows) < prompts:
        raise UserError(f"objective=grpo: answers to {prompts} prompts are sampled at once, and there are {len(rows)} rows of train; use a smaller"
                        " trainer.per_device_train_batch_size, or a larger objective.num_generations")  # fmt: skip
    return rewards
