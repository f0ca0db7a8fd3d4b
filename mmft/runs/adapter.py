"""Put a stored adapter on a base model and check every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ..adapters.attach import run_saved_modules_in_float
from ..common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """The model with the adapter of `folder`, in eval mode. model: the base, or a model with other adapters, which gets one more.

    Raises UserError for a folder that cannot be read and for an adapter that does not fit. peft itself only warns about keys that fit
    nothing; here every weight must be loaded as it is stored.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'adapter_model.safetensors'}: cannot be read: {error}") from None
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'adapter_config.json'}: cannot be read: {error}") from None
    if settings.get("megatron_config"):  # peft would import the module that megatron_core names
        raise UserError(f"{folder / 'adapter_config.json'}: megatron_config names a module to import, which an adapter may not")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
            tuned = model
        else:
            tuned = PeftModel.from_pretrained(model, folder, name)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{folder}: this adapter does not fit the base model: {str(error).strip().splitlines()[0]}") from None
    if any("float32" in str(v.dtype) for v in stored.values()):
        run_saved_modules_in_float(tuned)  # peft loads modules_to_save in the base's dtype, which rounds them
        set_peft_model_state_dict(tuned, stored, name)
    loaded = get_peft_model_state_dict(tuned, adapter_name=name, save_embedding_layers=False)
    odd = sorted(set(stored) ^ set(loaded)) or sorted(k for k in stored if stored[k].shape != loaded[k].shape)
    if odd:
        raise UserError(f"{folder}: {len(odd)} weights of the adapter do not fit the base model, e.g. {odd[0]}")
    for key, value in stored.items():
        if not bool((loaded[key].cpu().to(value.dtype) == value).all()):
            raise UserError(f"{folder}: {key} was not loaded as it is stored")
    return tuned.eval()
