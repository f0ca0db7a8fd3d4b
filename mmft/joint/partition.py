"""Decide which points of a sweep can be trained jointly, and say why a point cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.plan import plan_adapter
from ..common.errors import UserError
from ..common.hashing import key_of
from ..common.model_parts import is_encoder_decoder, part_of
from ..config.build import build
from ..config.settings import Section, Settings, sharded_by
from ..losses.policy import Grpo
from ..models.device import choose_device
from ..models.quantization import saved_quantization
from ..pipeline.prepare import locate_and_outline
from ..rewrites.row_attention import DEVICES as BY_ROW
from ..sweeps.context import SweepContext
from ..system.memory import USABLE, free_memory
from ..training.compiled import wanted_compile
from .memory import adapter_bytes

# Sections that each member has for itself; every other setting must be the same in a group.
INDIVIDUAL = ("seed", "name", "run_dir", "rank_by", "generation", "evaluation")
# Keys of LoraConfig that only decide what is added to the output of linear layers. Others (DoRA, biases, initialisations that change
# the base, modules_to_save) change what the base computes for everyone.
LORA = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora",
    "rank_pattern", "alpha_pattern", "scope", "start", "parts", "init_batches", "task_type", "inference_mode",
)  # fmt: skip
PLAIN = {"method": ("lora", None), "bias": ("none", None), "init_lora_weights": (True, None, "gaussian", "orthogonal"), "fan_in_fan_out": (False, None)}
# Keys of TrainingArguments that concern a member's optimizer, schedule, logs and evaluations, not its batches.
TRAINER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "learning_rates", "weight_decays", "loraplus_lr_ratio", "ema_decay", "label_smoothing_factor", "early_stopping_patience", "early_stopping_threshold",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_steps", "logging_first_step", "logging_strategy",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps", "save_total_limit", "per_device_eval_batch_size",
)  # fmt: skip


@dataclass
class Candidate:
    """A point that may join a group: its position in the sweep, its resolved settings, the bytes of its adapter, its device."""

    number: int
    settings: Settings
    bytes: int = 0
    device: str = "cpu"


@dataclass
class Partition:
    """groups: candidates that are trained jointly. alone: (candidate, why it could not join)."""

    groups: list[list[Candidate]] = field(default_factory=list)
    alone: list[tuple[Candidate, str]] = field(default_factory=list)


def why_alone(settings: Settings) -> str | None:
    """Why a point with these settings can join no group; None if the settings alone do not forbid it."""
    lora, trainer = settings["lora"], settings["trainer"]
    if lora.get("r") is None:
        return "lora=none trains the weights that all would share"
    if any((settings["model"].get("quantization") or {}).get(k) for k in ("load_in_8bit", "load_in_4bit")):
        return "model.quantization: preparing a quantised base for training changes it"
    if settings["model"].get("rewrites") == "off":
        return "model.rewrites=off: joint training replaces the forward of adapted layers"
    for key, value in lora.items():
        if key in PLAIN and value not in PLAIN[key] or key not in (*LORA, *PLAIN) and value not in (None, False, [], {}):
            return f"lora.{key}={value} does more than add to the output of a layer"
    if sharded := sharded_by(trainer):
        return f"trainer.{sharded} takes a model apart"
    if wanted_compile(trainer) is not None:
        return "trainer.torch_compile would compile layers that know whose rows they get anew for every batch"
    if trainer.get("lora_fa"):
        return "trainer.lora_fa makes an optimizer of the whole adapter"
    if trainer.get("neftune_noise_alpha"):
        return "trainer.neftune_noise_alpha adds noise to the embeddings, which all would share"
    objective = build(settings["objective"], "objective")
    if isinstance(objective, Grpo):
        return f"objective={objective.NAME} samples answers, which TRL's trainer does for one run at a time"
    if objective.MISMATCHED:
        return f"objective={objective.NAME} needs a pass of its own for the answers of other rows"
    if "swanlab" in str(settings["logger"]):
        return "logger: SwanLab keeps one run in a process"
    return None


def group_key(settings: Settings) -> str:
    """Equal for points that can share forward passes."""
    lora = {k: v for k, v in settings["lora"].items() if k not in (*LORA, *PLAIN)}
    trainer = {k: v for k, v in settings["trainer"].items() if k not in TRAINER}
    rest = {k: v for k, v in settings.items() if k not in (*INDIVIDUAL, "lora", "trainer", "data", "objective")}
    # one batch of pairs serves every objective of pairs, and the beta of each
    return key_of(lora, trainer, rest, _without_draws(settings["data"]), build(settings["objective"], "objective").PREFERENCE)


def _without_draws(data: Section) -> Section:
    """The data without the keys that decide how often a mix draws which rows: each member draws its own."""
    sources = data.get("sources")
    if not isinstance(sources, dict):
        return data
    return {**data, "draws": None, "sources": {name: {k: v for k, v in source.items() if k != "weight"} for name, source in sources.items()}}


def partition(candidates: Sequence[Candidate], context: SweepContext, most: int | None = None) -> Partition:
    """Groups of points in the given order, none with more than `most` points, or with more adapters than memory holds."""
    result = Partition()
    by_key: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        why = why_alone(candidate.settings) or _why_alone_by_plan(candidate, context)
        if why:
            result.alone.append((candidate, why))
        else:
            by_key.setdefault(group_key(candidate.settings), []).append(candidate)
    for members in by_key.values():
        budget = USABLE * free_memory(members[0].device)
        group: list[Candidate] = []
        for candidate in members:
            if group and (len(group) == most or sum(c.bytes for c in [*group, candidate]) > budget):
                result.groups.append(group)
                group = []
            group.append(candidate)
        result.groups.append(group)
    for group in [g for g in result.groups if len(g) == 1]:
        result.groups.remove(group)
        result.alone.append((group[0], "no other point shares its base, data, batch and precision"))
    return result


def _why_alone_by_plan(candidate: Candidate, context: SweepContext) -> str | None:
    """Why the placement of its adapter keeps a point alone. Also notes the adapter's size and the device."""
    settings = candidate.settings
    try:
        candidate.device = choose_device(str(settings["model"].get("device") or "auto"))
        family = build(settings["model"], "model")
        _, outline = locate_and_outline(family, context)
        skeleton: Any = outline
        plan = plan_adapter(skeleton, settings["lora"])
    except UserError as error:  # the point's own run says it again
        return str(error)
    if is_encoder_decoder(skeleton.config):
        return "model.path: an encoder-decoder model reads prompts and answers in two places"
    if not family.images_apart:
        return "model.path: the image inputs of its batches cannot be joined"
    if saved_quantization(skeleton.config):
        return "model.path: preparing a base that is saved quantised for training changes it"
    if settings["trainer"].get("packing") and (candidate.device not in BY_ROW or settings["model"].get("attn_implementation") not in (None, "sdpa")):
        return "trainer.packing=true: attention would be computed over the rows of all points; only on a CPU, with sdpa, each row is computed alone"
    head = skeleton.get_output_embeddings()
    modules = dict(skeleton.named_modules())
    for name in plan.adapted:
        if part_of(name) != "language" or modules[name] is head or not isinstance(modules[name], torch.nn.Linear):
            return f"the adapter reaches {name}, where rows of several points could not be told apart"
    if plan.settings.get("modules_to_save"):
        return f"lora.modules_to_save trains {plan.settings['modules_to_save'][0]} whole"
    candidate.bytes = adapter_bytes(skeleton, plan)
    return None
