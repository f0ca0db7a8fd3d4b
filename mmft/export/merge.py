"""Save a merged model for plain transformers and for serving engines, and load it as these do."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..models.load import load_model, silent_transformers
from ..runs.adapter import load_adapter
from ..runs.directory import Run
from ..runs.open import OpenedRun

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import GenerationConfig, PreTrainedModel, ProcessorMixin


def unquantised(opened: OpenedRun, weights: Path, base: str) -> PeftModel:
    """The adapter of `weights` over an unquantised base in the run's dtype.

    base: `dequantised` (the weights the adapter was trained on) or `original` (the base's own files).
    """
    dtype = opened.loaded.dtype
    if base == "original":
        family = replace(opened.family, quantization=None, dtype=str(dtype).removeprefix("torch."))
        return load_adapter(load_model(family, located=opened.loaded.located).model, weights)
    quantised = load_model(opened.family, located=opened.loaded.located).model
    try:
        with silent_transformers():  # which says that it dequantises
            whole = quantised.dequantize(dtype)
        return load_adapter(whole, weights)
    except NotImplementedError:
        method = opened.loaded.quantization.method if opened.loaded.quantization else ""
        raise UserError(f"this adapter cannot be merged: transformers cannot dequantise {method} weights; use the adapter unmerged") from None


def save_merged(model: PreTrainedModel, processor: ProcessorMixin, generation_config: GenerationConfig | None, folder: Path, max_shard_size: str) -> None:
    """Write weights, config, processor, chat template and generation config, for transformers and for serving engines.

    preprocessor_config.json repeats the image part of processor_config.json: older loaders look for that name. Raises UserError.
    """
    if generation_config is not None:
        model.generation_config = generation_config
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"the merged model cannot be saved: {' '.join(str(error).split())[:300]}") from None
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def missing_files(folder: Path, chat: bool) -> list[str]:
    """What a serving engine (vLLM) looks for and would not find in a saved model. chat: whether it needs a chat template."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ["generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"]
    missing = [name for name in names if not (folder / name).is_file()]
    missing += [f"{key} in config.json" for key in ("architectures", "model_type") if not config.get(key)]
    if "quantization_config" in config:
        missing.append("a config.json without quantization_config")
    if chat and not (folder / "chat_template.jinja").is_file():
        missing.append("chat_template.jinja")
    return missing


def load_plain(folder: Path, dtype: torch.dtype, device: str, attention: str | None) -> tuple[PreTrainedModel, ProcessorMixin]:
    """(model, processor) of a saved folder through plain transformers. Raises UserError if a weight is missing or unused."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True, use_safetensors=True
    )
    odd = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info.get("mismatched_keys", ())]))
    if odd:
        raise UserError(f"the merged model does not load as it was saved: {len(odd)} weights are missing, left over or of another shape, e.g. {odd[0]}")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def generation_config(run: Run) -> GenerationConfig | None:
    """The run's stored generation config (limits and end tokens); None without one: then the base's stays."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(run / "adapter") if (run / "adapter" / "generation_config.json").is_file() else None


def check_disk_space(model: Any, folder: Path) -> None:
    """Raises UserError if the merged model does not fit on the disk of `folder`."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters()) + (64 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(f"{folder}: {free >> 20} MB free, the merged model needs {needed >> 20} MB; free some, or choose another out=...")
