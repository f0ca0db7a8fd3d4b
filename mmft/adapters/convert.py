"""Turn an adapter whose initialisation changed the base weights (PiSSA, OLoRA, CorDA, LoRA-GA) into a plain adapter over the original base.

    W = W_res + s B0 A0        after the initialisation, s = lora_alpha / r
    W' = W_res + s B A         after training
    W' - W = s (B A - B0 A0) = s [B, -B0] [A; A0]

The saved adapter has twice the rank and the same scaling, so every verb and plain peft load it over the original base.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.hashing import sha256
from ..config.settings import Section

if TYPE_CHECKING:
    import torch

METHODS = ("pissa", "olora", "corda", "lora_ga")  # the first words of init_lora_weights that change the base
REPEATED = ("pissa", "olora")  # those that need no data, so that peft repeats them wherever it loads such a checkpoint
START = "adapter_start.safetensors"  # in a run's directory


def changes_base(settings: Section) -> bool:
    """Whether `init_lora_weights` subtracts the first adapter from the base weights."""
    return str(settings.get("init_lora_weights") or "").startswith(METHODS)


def initial_matrices(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the adapter's matrices before training, by their names in adapter_model.safetensors."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().cpu().clone() for name, tensor in state.items() if ".lora_A." in name or ".lora_B." in name}


def write_start(run: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Keep the first matrices in the run, by which its checkpoints can be converted too."""
    from safetensors.torch import save_file

    staging = run / f".{START}.{os.getpid()}"
    save_file({name: tensor.contiguous() for name, tensor in initial.items()}, staging)
    os.replace(staging, run / START)


def plain_checkpoint(run: Path, checkpoint: Path) -> Path:
    """A folder with a checkpoint's adapter over the original base: the checkpoint itself, or a converted copy beside it.

    Raises UserError if the copy needs the adapter's first matrices and the run has not kept them.
    """
    file = checkpoint / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not changes_base(config):
        return checkpoint
    if not (run / START).is_file():
        if str(config["init_lora_weights"]).startswith(REPEATED):  # a run from before; peft takes the part out of the base again
            return checkpoint
        raise UserError(f"{checkpoint}: sits on a base that its initialisation changed, and {run / START} is missing; use the run's final adapter")
    from safetensors.torch import load_file

    plain = checkpoint.with_name(f".plain-{checkpoint.name.split('-')[-1]}-{sha256(checkpoint / 'adapter_model.safetensors')[:12]}")
    if not plain.is_dir():
        staging = plain.with_name(f"{plain.name}.{os.getpid()}")
        shutil.copytree(checkpoint, staging, ignore=shutil.ignore_patterns("optimizer*", "scheduler*", "rng_state*", "manifest.json"))
        convert_saved(staging, load_file(run / START))
        os.replace(staging, plain)
    return plain


def convert_saved(folder: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Rewrite the adapter in `folder` as a plain one over the original base. initial: `initial_matrices` before training."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    state = load_file(weights)
    for name, first in initial.items():
        trained = state[name]
        first = first.to(trained.dtype)
        state[name] = torch.cat([trained, first], dim=0) if ".lora_A." in name else torch.cat([trained, -first], dim=1)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights, metadata={"format": "pt"})
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    factor = math.sqrt(2) if config.get("use_rslora") else 2  # keeps lora_alpha / sqrt(r), or lora_alpha / r
    config |= {
        "init_lora_weights": True, "corda_config": None, "lora_ga_config": None, "r": 2 * config["r"], "lora_alpha": factor * config["lora_alpha"],
        "rank_pattern": {k: 2 * v for k, v in (config.get("rank_pattern") or {}).items()},
        "alpha_pattern": {k: factor * v for k, v in (config.get("alpha_pattern") or {}).items()},
    }  # fmt: skip
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
