"""Merge an adapter into its base, save it the way plain transformers loads it, and measure what the saved model computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.tensors import eval_mode, to_device

# The largest difference of a logit that rounding explains, as a share of the largest logit of base and adapter. Adapter and base add their
# products in the computing dtype, the merged weight is rounded once to it: some tens of roundings (2^-24, 2^-11, 2^-8),
# summed over the layers. Losing an adapter that learned something shows as more.
# fp32: adapters of every part of a deep model were seen to round to 2.1e-4; one that is lost moves logits by a thousand times as much
SHARE = {"float32": 5e-4, "float16": 1e-2, "bfloat16": 6e-2}


def merged(model: Any) -> Any:
    """The base with the adapter in its weights, no peft layers left. `model`: a PeftModel over an unquantised base.

    Errors raised: UserError when peft cannot merge this adapter, or its weights are not finite.
    """
    untie(model.get_base_model())
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # peft warns of tied weights, which are untied here
            plain = model.merge_and_unload(safe_merge=True)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"this adapter cannot be merged: {' '.join(str(error).split())[:300]}") from None
    left = [n for n, _ in plain.named_modules() if "lora_" in n or n.endswith("modules_to_save")]
    if left:
        raise UserError(f"this adapter cannot be merged: peft left {left[0]} in the model")
    head, table = plain.get_output_embeddings(), plain.get_input_embeddings()
    if head is not None and table is not None and head.weight.data_ptr() != table.weight.data_ptr():
        for config in (plain.config, plain.config.get_text_config()):
            config.tie_word_embeddings = False  # or loading would put the table over the trained head
    return plain.eval()


def untie(model: Any) -> None:
    """Give the language head weights of its own where an adapter sits on it or on the token table.

    Both may be one tensor; what is added to one would change the other too.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if not any(isinstance(m, BaseTunerLayer) for m in (head, table)):
        return
    inner = [m.get_base_layer() if isinstance(m, BaseTunerLayer) else m for m in (head, table)]
    if inner[0].weight.data_ptr() == inner[1].weight.data_ptr():
        inner[0].weight = torch.nn.Parameter(inner[0].weight.detach().clone(), requires_grad=False)


def save(model: Any, processor: Any, generation_config: Any | None, folder: Path, max_shard_size: str) -> None:
    """Weights, configuration, processor, chat template and generation settings into `folder`, for transformers and for servers.

    preprocessor_config.json repeats the image part of processor_config.json: loaders older than it look for that name.
    """
    if generation_config is not None:
        model.generation_config = generation_config
    try:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"the merged model cannot be saved: {' '.join(str(error).split())[:300]}") from None
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def lacking(folder: Path, chat: bool) -> list[str]:
    """What a serving engine's loader (vLLM's) looks for and would not find in a saved model; [] when all is there."""
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ["generation_config.json", "processor_config.json", "preprocessor_config.json", "tokenizer_config.json", "tokenizer.json"]
    found = [name for name in names if not (folder / name).is_file()]
    found += [f"{key} in config.json" for key in ("architectures", "model_type") if not config.get(key)]
    if "quantization_config" in config:
        found.append("a config.json without quantization_config")
    if chat and not (folder / "chat_template.jinja").is_file():
        found.append("chat_template.jinja")
    return found


def reload(folder: Path, dtype: Any, device: str, attention: str | None) -> tuple[Any, Any]:
    """(model, processor) of a saved folder through plain transformers. Errors raised: UserError when a weight is missing or left over."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation=attention, output_loading_info=True, use_safetensors=True
    )
    odd = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info.get("mismatched_keys", ())]))
    if odd:
        raise UserError(f"the merged model does not load as it was saved: {len(odd)} weights are missing, left over or of another shape, e.g. {odd[0]}")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def batches(collator: Any, rows: Sequence[Any]) -> list[dict[str, Any]]:
    """One training batch a row (no padding, whose logits mean nothing)."""
    made = [collator([rows[i]]) for i in range(len(rows))]
    for batch in made:
        batch.pop("row_ids", None)
    return made


def answer_logits(model: Any, made: list[dict[str, Any]]) -> list[Any]:
    """The logits that predict each row's answer, (answer tokens, V) float32 on the CPU."""
    import torch

    from ..collators.base import IGNORE
    from ..losses.supervised import takes_logits_to_keep

    found = []
    with torch.no_grad(), eval_mode(model):
        for batch in made:
            labels = batch["labels"]
            keep = torch.zeros_like(labels, dtype=torch.bool)
            keep[:, :-1] = labels[:, 1:] != IGNORE
            inputs = to_device({k: v for k, v in batch.items() if k != "labels"}, model.device)
            options = {"logits_to_keep": keep.to(model.device)} if takes_logits_to_keep(model) else {}
            logits = model(**inputs, use_cache=False, **options).logits
            logits = logits[keep.to(logits.device)] if logits.dim() == 3 else logits
            found.append(logits.float().cpu())
    return found


def largest_difference(first: list[Any], second: list[Any]) -> float:
    """The largest absolute difference between two models' logits; infinite where one is not a number."""
    gaps = [float((a - b).abs().max()) for a, b in zip(first, second, strict=True)]
    return max(math.inf if math.isnan(gap) else gap for gap in gaps)


def largest(logits: list[Any]) -> float:
    return max(float(x.abs().max()) for x in logits)


def tolerance(dtype: str, logits: list[Any]) -> float:
    """SHARE of the largest logit, of the base's or with the adapter."""
    return SHARE[dtype] * largest(logits)


def same_inputs(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str | None:
    """The first key of a batch that two processors make differently, or None."""
    import torch

    for a, b in zip(first, second, strict=True):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b or not (torch.equal(a[key], b[key]) if torch.is_tensor(a[key]) else a[key] == b[key]):
                return key
    return None
