"""Learning rate and weight decay of each part of the model, LoRA+ and LoRA-FA: checked on the plan, applied to a new optimizer.

    LoRA+    B learns at `loraplus_lr_ratio` times the rate of A (Hayou et al. 2024, arXiv 2402.12354)
    LoRA-FA  A stays as it is, and AdamW steps with the gradient of B that fits it best (Zhang et al. 2023, arXiv 2308.03303)
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..common.model_parts import PARTS, part_of
from ..config.settings import Section, sharded_by

if TYPE_CHECKING:
    import torch

BY_PART = ("learning_rates", "weight_decays")
WITHOUT_GROUPS = ("lomo", "adalomo", "muon", "dion")  # optimizers that take no groups of parameters
FA_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw")  # whose step peft's optimizer takes


def check_rates(trainer: Section, trained: Collection[str], lora: Section | None, adapter: str = "lora") -> None:
    """Check the keys of this module. trained: the parts in which something is trained. lora: the adapter's settings; None without one. adapter: its method.

    Raises UserError.
    """
    for key in BY_PART:
        values = trainer.get(key) or {}
        if not isinstance(values, dict):
            raise UserError(f"trainer.{key}={values}: must name parts, e.g. trainer.{key}.vision=1e-5")
        for part, value in values.items():
            if part not in PARTS:
                raise UserError(f"trainer.{key}.{part}: no such part.{nearest(str(part), PARTS)} There are: {', '.join(PARTS)}.")
            if value is None:
                continue
            if _number(value) is None:
                raise UserError(f"trainer.{key}.{part}={value}: must be a number, 0 or above")
            if part not in trained:
                raise UserError(f"trainer.{key}.{part}: nothing in the {part} part is trained; trained are: {', '.join(sorted(trained))} (lora.scope, lora.whole)")
    ratio, optimizer = trainer.get("loraplus_lr_ratio"), str(trainer.get("optim") or "")
    if ratio is not None and not (_number(ratio) or 0) > 0:
        raise UserError(f"trainer.loraplus_lr_ratio={ratio}: must be a number above 0, or null")
    for key in ("loraplus_lr_ratio", "lora_fa"):
        if trainer.get(key) and lora is None:
            raise UserError(f"trainer.{key}: concerns the matrices of an adapter, and lora=none has none; drop it")
        if trainer.get(key) and adapter not in ("lora", "dora"):
            raise UserError(f"trainer.{key}: concerns the matrices A and B of LoRA, and lora.method={adapter} has none; drop it")
    if trainer.get("lora_fa"):
        if trainer.get("loraplus_lr_ratio"):
            raise UserError("trainer.lora_fa: leaves the matrices A as they are, so LoRA+ has no rate to multiply; drop one of them")
        if optimizer and optimizer not in FA_OPTIMIZERS:
            raise UserError(f"trainer.lora_fa: is a form of AdamW; drop trainer.optim={optimizer}")
        more = next((key for key in ("use_dora", "lora_bias", "target_parameters") if (lora or {}).get(key)), None)
        if more is not None:
            raise UserError(f"trainer.lora_fa: knows the matrices A and B alone; drop lora.{more}")
        if sharded_by(trainer):
            raise UserError("trainer.lora_fa: needs the adapter's matrices whole on one device; drop trainer.fsdp and trainer.deepspeed")
    if has_groups(trainer) and optimizer.startswith(WITHOUT_GROUPS):
        raise UserError(f"trainer.optim={optimizer}: takes no groups of parameters, so a part cannot have a rate of its own")


def has_groups(trainer: Section) -> bool:
    """Whether the optimizer needs groups by part."""
    return any(value is not None for key in BY_PART for value in (trainer.get(key) or {}).values()) or bool(trainer.get("loraplus_lr_ratio"))


def rate_of(trainer: Section, part: str) -> float:
    """The learning rate of a part; of its matrices A with LoRA+."""
    own = (trainer.get("learning_rates") or {}).get(part)
    return float(own if own is not None else trainer.get("learning_rate") or 0.0)


def rate_notes(trainer: Section) -> list[str]:
    """What the plan's table cannot say in a cell."""
    notes = []
    if ratio := trainer.get("loraplus_lr_ratio"):
        notes.append(f"LoRA+: the matrices B learn at {float(ratio):g} times the rate of their part")
    if trainer.get("lora_fa"):
        notes.append("LoRA-FA: the matrices A stay as they are")
    if trainer.get("ema_decay"):
        notes.append(f"the run ends with the average of its weights over the steps, decay {float(trainer['ema_decay']):g}")
    if decays := {part: value for part, value in (trainer.get("weight_decays") or {}).items() if value is not None}:
        notes.append("weight decay: " + ", ".join(f"{part} {float(value):g}" for part, value in decays.items()) + f", others {float(trainer.get('weight_decay') or 0):g}")
    return notes


def regroup(optimizer: torch.optim.Optimizer, model: torch.nn.Module, trainer: Section) -> None:
    """Divide the groups of a new optimizer by part, and with LoRA+ by matrix, each with its rate and weight decay.

    The Trainer has made two groups: parameters with weight decay, and biases and norms without. Parameters keep their order.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    decays, ratio = trainer.get("weight_decays") or {}, float(trainer.get("loraplus_lr_ratio") or 1.0)
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.param_groups.clear()
    for number, group in enumerate(groups):
        divided: dict[tuple[str, bool], list[Any]] = {}
        for parameter in group["params"]:
            name = names[id(parameter)]
            divided.setdefault((part_of(name), ratio != 1.0 and ".lora_B." in name), []).append(parameter)
        for (part, is_b), parameters in divided.items():
            rate = rate_of(trainer, part)
            decay = decays.get(part)
            optimizer.add_param_group({
                **group, "params": parameters, "lr": rate * ratio if is_b else rate, "part": f"{part}_B" if is_b else part,
                "weight_decay": float(decay) if decay is not None and number == 0 else group["weight_decay"],
            })  # fmt: skip


def rates_now(optimizer: Any) -> dict[str, float]:
    """`learning_rate/PART` of each part of a divided optimizer, for the log."""
    return {f"learning_rate/{group['part']}": float(group["lr"]) for group in getattr(optimizer, "param_groups", ()) if "part" in group}


def lora_fa_optimizer(model: Any, trainer: Section, weight_decay: float) -> torch.optim.Optimizer:
    """peft's LoRA-FA optimizer with the config's betas and epsilon, and a group for each part."""
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    optimizer = create_lorafa_optimizer(model, r=config.r, lora_alpha=config.lora_alpha, lr=rate_of(trainer, ""), weight_decay=weight_decay)
    [whole] = optimizer.param_groups
    optimizer.param_groups.clear()
    decays = trainer.get("weight_decays") or {}
    by_part: dict[str, list[int]] = {}
    for i, name in enumerate(whole["names"]):  # pairs of A and B stand side by side
        if ".lora_" in name or whole["params"][i].requires_grad:
            by_part.setdefault(part_of(name), []).append(i)
    for part, places in by_part.items():
        chosen = {key: [whole[key][i] for i in places] for key in ("params", "names", "scaling_factors")}
        optimizer.add_param_group({
            **whole, **chosen, "lr": rate_of(trainer, part), "part": part, "eps": trainer.get("adam_epsilon", 1e-8),
            "betas": (trainer.get("adam_beta1", 0.9), trainer.get("adam_beta2", 0.999)), "weight_decay": float(decays.get(part, weight_decay)),
        })  # fmt: skip
    return optimizer


def _number(value: Any) -> float | None:
    """The value as a number, 0 or above; None if it is none. yaml reads 1e-4 as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if not isinstance(value, bool) and math.isfinite(number) and number >= 0 else None
