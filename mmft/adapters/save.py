"""Write what was trained: an adapter that plain peft loads, with the processor that plain transformers loads."""

from __future__ import annotations

import os
import shutil
from typing import Any

from ..runs.directory import Run


def save_trained(run: Run, model: Any, plan: Any, loaded: Any, located: Any, generation_config: Any | None, weights: dict | None = None) -> None:
    """Fill adapter/ (or model/ after full training) with weights, processor, chat template and generation settings.

    The folder is written beside and renamed: it is there whole or not at all. `weights`: the state dict
    of a model whose own weights are spread over processes.
    """
    if not run.writes:
        return
    name = "model" if plan.method == "full" else "adapter"
    final, beside = run / name, run / f".{name}.{os.getpid()}"
    for torn in run.path.glob(f".{name}.*"):  # of a save that was killed
        shutil.rmtree(torn, ignore_errors=True)
    if plan.method == "lora":
        config = model.peft_config["default"]
        on_hub = located.hub in ("huggingface", "modelscope")
        config.base_model_name_or_path = located.path if on_hub else str(located.folder)
        config.revision = located.revision if located.hub == "huggingface" else None
        # the token embeddings are frozen; peft's guess whether to save them asks a hub
        model.save_pretrained(beside, save_embedding_layers=False, state_dict=weights)
    else:
        model.save_pretrained(beside, state_dict=weights)
    loaded.processor.save_pretrained(beside)
    if generation_config is not None:
        generation_config.save_pretrained(beside)
    old = run / f".{name}.old"
    if final.exists():  # killed behind its saving, and gone on with from a checkpoint
        os.replace(final, old)
    os.replace(beside, final)
    shutil.rmtree(old, ignore_errors=True)
