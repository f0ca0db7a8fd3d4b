"""Which points of a sweep can be trained together, and why a point cannot."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..common.errors import UserError
from ..common.hashing import key_of
from ..system.memory import ROOM, free_memory
from .memory import adapter_bytes

# What each member has for itself; every other setting must be the same in a group.
OWN = ("seed", "name", "run_dir", "objective", "generation", "evaluation")
# LoraConfig's keys that only say what is added to the output of linear layers; others (DoRA, biases, initialisations that
# change the base, modules trained whole) change what the base computes for everyone.
LORA = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "use_rslora",
    "rank_pattern", "alpha_pattern", "scope", "task_type", "inference_mode",
)  # fmt: skip
PLAIN = {"bias": ("none", None), "init_lora_weights": (True, None, "gaussian", "orthogonal"), "fan_in_fan_out": (False, None)}
# TrainingArguments' keys that concern one member's optimizer, schedule, logs and evaluations, not its batches.
TRAINER = (
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "optim_args",
    "adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor", "early_stopping_patience", "early_stopping_threshold",
    "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "logging_steps", "logging_first_step", "logging_strategy",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps", "save_total_limit", "per_device_eval_batch_size",
)  # fmt: skip


@dataclass
class Candidate:
    """One point on its way into a group: its position in the sweep, its resolved settings."""

    number: int
    settings: dict[str, Any]
    bytes: int = 0
    device: str = "cpu"


@dataclass
class Groups:
    """`together`: lists of candidates to train in step. `alone`: (candidate, why it could not join)."""

    together: list[list[Candidate]] = field(default_factory=list)
    alone: list[tuple[Candidate, str]] = field(default_factory=list)


def reason(settings: dict[str, Any]) -> str | None:
    """Why a point with these settings can be in no group, by its settings alone; None where nothing forbids it."""
    lora, trainer = settings["lora"], settings["trainer"]
    if lora.get("r") is None:
        return "lora=none trains the weights that all would share"
    if any((settings["model"].get("quantization") or {}).get(k) for k in ("load_in_8bit", "load_in_4bit")):
        return "model.quantization: preparing a quantised base for training changes it"
    for key, value in lora.items():
        if key in PLAIN and value not in PLAIN[key] or key not in (*LORA, *PLAIN) and value not in (None, False, [], {}):
            return f"lora.{key}={value} does more than add to the output of a layer"
    for key in ("torch_compile", "fsdp", "deepspeed"):
        if trainer.get(key):
            return f"trainer.{key} takes a model apart"
    if "swanlab" in str(settings["logger"]):
        return "logger: SwanLab keeps one run in a process"
    return None


def key(settings: dict[str, Any]) -> str:
    """Equal for points that can share passes."""
    lora = {k: v for k, v in settings["lora"].items() if k not in (*LORA, *PLAIN)}
    trainer = {k: v for k, v in settings["trainer"].items() if k not in TRAINER}
    rest = {k: v for k, v in settings.items() if k not in (*OWN, "lora", "trainer")}
    return key_of(lora, trainer, rest)


def divide(candidates: list[Candidate], shared: Any, most: int | None = None) -> Groups:
    """Groups of points in the order given, none larger than `most` or than memory holds the adapters of."""
    groups = Groups()
    by_key: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        why = reason(candidate.settings) or _misplaced(candidate, shared)
        if why:
            groups.alone.append((candidate, why))
        else:
            by_key.setdefault(key(candidate.settings), []).append(candidate)
    for own in by_key.values():
        room = ROOM * free_memory(own[0].device)
        group: list[Candidate] = []
        for candidate in own:
            if group and (len(group) == most or sum(c.bytes for c in [*group, candidate]) > room):
                groups.together.append(group)
                group = []
            group.append(candidate)
        groups.together.append(group)
    for group in [g for g in groups.together if len(g) == 1]:
        groups.together.remove(group)
        groups.alone.append((group[0], "no other point shares its base, data, batch and precision"))
    return groups


def _misplaced(candidate: Candidate, shared: Any) -> str | None:
    """Why where the adapter lies keeps a point alone, from the model's shape; its size and its device are noted on the way."""
    from ..adapters import lora
    from ..common.model_parts import part_of
    from ..config.build import build
    from ..models.device import choose_device

    try:
        candidate.device = choose_device(str(candidate.settings["model"].get("device") or "auto"))
        skeleton = shared.skeleton(build(candidate.settings["model"], "model"))
        plan = lora.plan(skeleton, candidate.settings["lora"])
    except UserError as error:  # said again, in its own run, when its turn comes
        return str(error)
    head = skeleton.get_output_embeddings()
    modules = dict(skeleton.named_modules())
    for name in plan.adapted:
        if part_of(name) != "language" or modules[name] is head:
            return f"the adapter reaches {name}, where rows of several points could not be told apart"
    if plan.settings.get("modules_to_save"):
        return f"lora.modules_to_save trains {plan.settings['modules_to_save'][0]} whole"
    candidate.bytes = adapter_bytes(skeleton, plan)
    return None
