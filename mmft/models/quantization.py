"""Quantised base models: asked for by the config or saved in the checkpoint; preparation for training."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..system import startup

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel

BITSANDBYTES = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")  # quant_method in config.json


@dataclass(frozen=True)
class Quantization:
    """How the weights of a base model are quantised.

    method: transformers' quant_method. bits: of one weight. kind: nf4, fp4 or the method's name. saved: the checkpoint's own files are
    quantised, so there is no unquantised original.
    """

    method: str
    bits: int
    kind: str
    saved: bool

    def __str__(self) -> str:
        name = f"{self.bits}-bit base ({self.kind})" if self.bits == 4 or self.method not in BITSANDBYTES else f"{self.bits}-bit base"
        return f"{name}, as it was saved" if self.saved else name


def asked_quantization(config: BitsAndBytesConfig) -> Quantization:
    """The quantisation of a model that is quantised while it is loaded."""
    if config.load_in_8bit:
        return Quantization("bitsandbytes", 8, "int8", saved=False)
    return Quantization("bitsandbytes", 4, config.bnb_4bit_quant_type, saved=False)


def saved_quantization(config: PretrainedConfig) -> Quantization | None:
    """The quantisation of a checkpoint's own files, from its config.json; None if they are not quantised."""
    saved = getattr(config, "quantization_config", None)
    if saved is None:
        return None
    values: dict[str, Any] = saved if isinstance(saved, dict) else saved.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method") or "bitsandbytes"))
    if method in BITSANDBYTES:
        if values.get("load_in_4bit") or values.get("_load_in_4bit"):
            return Quantization(method, 4, values.get("bnb_4bit_quant_type") or "fp4", saved=True)
        return Quantization(method, 8, "int8", saved=True)
    bits = values.get("bits") or values.get("w_bit") or (4 if "4" in method else 8)
    return Quantization(method, int(bits), method, saved=True)


def check_saved(saved: Quantization, wanted: dict[str, Any] | None, device: str, full_training: bool, path: str) -> str:
    """A note on what the config's model.quantization does to a checkpoint that is saved quantised.

    Raises UserError if the checkpoint cannot be used: its weights are to be trained themselves, the config asks for other bits, or
    bitsandbytes does not work here.
    """
    where = f"model.path={path}: its weights are saved in {saved.bits} bit ({saved.kind})"
    if full_training:
        raise UserError(f"{where}, and quantised weights cannot be trained themselves; use an adapter (lora=default), or an unquantised checkpoint")
    startup.with_bitsandbytes()
    if saved.method in BITSANDBYTES and (reason := why_not_quantised(device)):
        raise UserError(f"{where}, which cannot be read here ({reason}); use an unquantised checkpoint")
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    bits = {8: "load_in_8bit", 4: "load_in_4bit"}
    for given, key in bits.items():
        if (wanted or {}).get(key) and given != saved.bits:
            raise UserError(f"{where}, so model.quantization.{key} is not possible; drop model.quantization, or use an unquantised checkpoint")
    return "model.quantization has no effect: the checkpoint's own is used" if any((wanted or {}).get(key) for key in bits.values()) else ""


def prepare_for_training(model: PreTrainedModel, quantization: Quantization | None, trainer: dict[str, Any], path: str) -> PreTrainedModel:
    """The model ready for an adapter: a quantised one as peft prepares it, which casts its other weights to fp32.

    trainer: the config section. Raises UserError for a quantisation that transformers cannot train.
    """
    if quantization is None:
        return model
    from peft import prepare_model_for_kbit_training

    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise UserError(f"model.path={path}: is quantised with {quantization.method}, over which transformers trains no adapter; use an unquantised checkpoint")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=uses_checkpointing(trainer))


def uses_checkpointing(trainer: dict[str, Any]) -> bool:
    """Whether the config section `trainer` asks for activation checkpointing, by its new or its old name."""
    return bool(trainer.get("activation_checkpointing") or trainer.get("gradient_checkpointing"))


def choose_quantization(wanted: dict[str, Any] | None, device: str) -> tuple[BitsAndBytesConfig | None, str]:
    """(the quantisation to load with, a note if this machine cannot do what the config asks for). Raises UserError for wrong keys."""
    wanted = {k: v for k, v in (wanted or {}).items() if v is not None}
    bits = [k for k in ("load_in_8bit", "load_in_4bit") if wanted.get(k)]
    if not bits:
        return None, ""
    if len(bits) == 2:
        raise UserError("model.quantization: load_in_8bit and load_in_4bit exclude each other; keep one")
    startup.with_bitsandbytes()
    reason = why_not_quantised(device)
    if reason:
        return None, f"{bits[0]} is not possible here ({reason}); loading unquantised weights instead"
    from transformers import BitsAndBytesConfig

    # bitsandbytes warns in every 8-bit layer and forward pass that fp32 inputs are cast, which is intended here
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kind = wanted.get("bnb_4bit_quant_type", "nf4")
    if kind not in ("nf4", "fp4"):
        raise UserError(f"model.quantization.bnb_4bit_quant_type={kind}: must be nf4 or fp4")
    try:
        return BitsAndBytesConfig(**wanted), ""
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model.quantization: {' '.join(str(error).split())}") from None


def why_not_quantised(device: str) -> str:
    """Why bitsandbytes cannot be used on this device; "" if it can."""
    if device.startswith("mps"):
        return "bitsandbytes has no kernels for mps"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed; pip install bitsandbytes"
    try:
        import bitsandbytes  # noqa: F401  # the import fails on platforms for which it ships no binary
    except Exception as error:
        return f"bitsandbytes does not load: {str(error).splitlines()[0]}"
    return ""
