"""Save what was trained: an adapter that plain peft loads, with the processor that plain transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .convert import convert_saved
from .plan import AdapterPlan

if TYPE_CHECKING:
    import torch


def save_trained(
    run: Path, model: Any, plan: AdapterPlan, processor: Any, base: tuple[str, str | None], generation_config: Any | None,
    state_dict: dict[str, torch.Tensor] | None = None, initial: dict[str, torch.Tensor] | None = None, chain: dict[str, Any] | None = None,
) -> Path:  # fmt: skip
    """Write run/adapter/ (run/model/ after full training): weights, processor, chat template and generation config.

    The folder is written under another name and renamed: it is complete or absent. base: (path or hub id, hub revision) for
    adapter_config.json. state_dict: the weights of a model that FSDP or DeepSpeed spread over processes. initial: the
    first matrices of an adapter whose initialisation changed the base (convert.py). chain: what an adapter sits on that does not sit on a base
    alone (base_chain.json).
    """
    name = "model" if plan.method == "full" else "adapter"
    final, staging = run / name, run / f".{name}.{os.getpid()}"
    for torn in run.glob(f".{name}.*"):  # left by a save that was killed
        shutil.rmtree(torn, ignore_errors=True)
    if plan.method == "lora":
        config = model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base
        # the token embeddings are frozen; peft would ask a hub whether to save them
        model.save_pretrained(staging, save_embedding_layers=False, state_dict=state_dict)
        if initial is not None:
            convert_saved(staging, initial)
        name_targets(staging, plan.adapted)
        if chain is not None:
            (staging / "base_chain.json").write_text(json.dumps(chain, indent=2) + "\n", encoding="utf-8")
    else:
        model.save_pretrained(staging, state_dict=state_dict)
    processor.save_pretrained(staging)
    if generation_config is not None:
        generation_config.save_pretrained(staging)
    old = run / f".{name}.old"
    if final.exists():  # the run was killed after its save and resumed from a checkpoint
        os.replace(final, old)
    os.replace(staging, final)
    shutil.rmtree(old, ignore_errors=True)
    return final


def name_targets(folder: Path, adapted: Iterable[str]) -> None:
    """Write the names of the adapted modules into adapter_config.json, in place of the one expression that matches them.

    It says the same to peft and vLLM; SGLang refuses an expression (`get_normalized_target_modules` in srt/lora/utils.py of 0.5.23).
    """
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if isinstance(config.get("target_modules"), str):
        names = config["target_modules"] = sorted(adapted)
        if inputs := config.get("feedforward_modules"):  # of IA3: beside names peft takes some of these only
            config["feedforward_modules"] = [n for n in names if any(n == w or n.endswith(f".{w}") for w in inputs)]
        file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")
