"""An adapter on the disk: its config and the shapes of its tensors; whether it is the one that a plan describes; its weights into a model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from .convert import changes_base
from .parts import rank_and_alpha
from .plan import AdapterPlan
from .starts import start_of

if TYPE_CHECKING:
    import torch

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys that must be the same where an adapter goes on, and their values where they are not given.
SAME: dict[str, Any] = {"use_rslora": False, "use_dora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "trainable_token_indices": None}


@dataclass(frozen=True)
class StoredAdapter:
    """config: adapter_config.json. shapes: of the tensors, by their names in the file."""

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def ranks(self) -> dict[str, int]:
        """Name of an adapted module, as the base model names it -> rank. Those of expert tensors are left out."""
        found = {}
        for name, shape in self.shapes.items():
            for mark, axis in ((".lora_A.", 0), (".lora_embedding_A", 0)):
                if mark in name and ".base_layer." not in name:
                    found[name.removeprefix(PREFIX).split(mark)[0]] = shape[axis]
        return found


def read_adapter(folder: Path) -> StoredAdapter:
    """Config and shapes of an adapter's folder; no weight is read. Raises UserError for files that are missing, torn or no LoRA adapter."""
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, "pt") as tensors:
            shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118  # not a mapping
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be read: {' '.join(str(error).split())[:200]}") from None
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: holds an adapter of the type {config.get('peft_type')}, and only LoRA adapters can be gone on with or combined")
    if changes_base(config):
        raise UserError(f"{folder}: is a checkpoint whose initialisation ({config['init_lora_weights']}) changed the base, and sits on that base; name the run, whose final adapter is a plain one")
    return StoredAdapter(folder, config, shapes)


def check_start(stored: StoredAdapter, plan: AdapterPlan, word: str) -> None:
    """Check that the plan describes the stored adapter: rank, scale, modules and what else is trained. word: the value of lora.start.

    Raises UserError that names what differs and the words that make both equal.
    """
    where, config, settings = f"lora.start={word}", stored.config, plan.settings
    if plan.method == "full":
        raise UserError(f"{where}: lora=none trains the weights themselves, and no adapter can go on; model.adapters=[{word}] merges it into them first")
    if not plan.is_lora:
        raise UserError(f"{where}: lora.method={plan.adapter} begins a new adapter, and only LoRA adapters go on; use lora.method=lora, or model.adapters=[{word}]")
    if changes_base(settings) or start_of(settings):
        raise UserError(f"{where}: lora.init_lora_weights={settings['init_lora_weights']} makes a new adapter, and this one has its weights; drop it")
    words = [f"lora.{key}={config.get(key)}" for key in ("r", "lora_alpha") if config.get(key) != settings.get(key)]
    words += [f"lora.{key}={_typed(config.get(key))}" for key, usual in SAME.items() if _plain(config.get(key) or usual) != _plain(settings.get(key) or usual)]
    if words:
        raise UserError(f"{where}: its adapter has other settings than this run; write {' '.join(words)}")
    there, planned = stored.ranks, set(plan.adapted)
    if set(there) != planned and not plan.parameters:
        odd = min(set(there) ^ planned)
        only = "the adapter and not the plan" if odd in there else "the plan and not the adapter"
        raise UserError(
            f"{where}: it adapts {len(there)} modules and this run {len(planned)}; {odd} is in {only}: set lora.target_modules and lora.scope as"
            f" they were (target_modules of the adapter: {_typed(config.get('target_modules'))[:160]})"
        )
    stored_settings = {**settings, **{k: config.get(k) for k in ("rank_pattern", "alpha_pattern")}}
    for name, rank in there.items():
        own, alpha = rank_and_alpha(settings, name)
        if own != rank or alpha != rank_and_alpha(stored_settings, name)[1]:
            raise UserError(
                f"{where}: {name} has rank {rank} and alpha {rank_and_alpha(stored_settings, name)[1]:g} there, and {own} and {alpha:g} here;"
                " set lora.rank_pattern and lora.alpha_pattern as they were"
            )


def fill(peft_model: Any, folder: Path) -> None:
    """Load the stored weights into the model's adapter, and check that each tensor is there as it is stored. Raises UserError."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    stored = load_file(folder / WEIGHTS)
    set_peft_model_state_dict(peft_model, stored)
    check_loaded(peft_model, stored, folder)


def check_loaded(peft_model: Any, stored: Mapping[str, torch.Tensor], folder: Path, name: str = "default") -> None:
    """Raises UserError unless the model's adapter has exactly the stored tensors; peft only warns about names that fit nothing."""
    from peft import get_peft_model_state_dict

    loaded = get_peft_model_state_dict(peft_model, adapter_name=name, save_embedding_layers=False)
    odd = sorted(set(stored) ^ set(loaded)) or sorted(k for k in stored if stored[k].shape != loaded[k].shape)
    if odd:
        raise UserError(f"{folder}: {len(odd)} weights of the adapter do not fit the base model, e.g. {odd[0]}")
    for key, value in stored.items():
        if not bool((loaded[key].cpu().to(value.dtype) == value).all()):
            raise UserError(f"{folder}: {key} was not loaded as it is stored")


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, (list, tuple, set)) else value


def _typed(value: Any) -> str:
    """A value as a word of the command line."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{k}:{_typed(v)}" for k, v in value.items()) + "}"
    if isinstance(value, Iterable) and not isinstance(value, str):
        return f"[{','.join(map(_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
