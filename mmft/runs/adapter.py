"""Put a stored adapter on a base model and check every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.attach import run_saved_modules_in_float
from ..adapters.starts import WITH_BATCHES
from ..adapters.stored import check_loaded
from ..common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default", hooks: list[Any] | None = None) -> PeftModel:
    """The model with the adapter of `folder`, in eval mode. model: the base, or a model with other adapters, which gets one more.

    Raises UserError for a folder that cannot be read and for an adapter that does not fit. peft itself only warns about keys that fit
    nothing; here every weight must be loaded as it is stored. hooks: gets the hooks by which fp32 modules compute in a half-precision base.
    """
    from peft import PeftModel, set_peft_model_state_dict
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
    if str(settings.get("init_lora_weights")) in WITH_BATCHES:
        raise UserError(f"{folder}: sits on a base that its initialisation ({settings['init_lora_weights']}) changed; use the run's final adapter, or run=DIR checkpoint=N")
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(folder, name)
            tuned = model
        else:
            tuned = PeftModel.from_pretrained(model, folder, name)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{folder}: this adapter does not fit the base model: {str(error).strip().splitlines()[0]}") from None
    if any("float32" in str(v.dtype) for v in stored.values()):
        handles = run_saved_modules_in_float(tuned)  # peft loads modules_to_save in the base's dtype, which rounds them
        if hooks is not None:
            hooks += handles
        set_peft_model_state_dict(tuned, stored, name)
    check_loaded(tuned, stored, folder, name)
    return tuned.eval()
