"""Choose device, dtype and quantisation for this machine, each with the reason that is printed."""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..system import startup
from ..system.distributed import local_rank, world_size

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def choose_device(wanted: str) -> str:
    """`auto` -> cuda, mps or cpu, the first that is available. Raises UserError for a device that is not available."""
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, present in available.items() if present)
    kind = wanted.split(":")[0]
    if kind not in available:
        raise UserError(f"model.device={wanted}: no such device.{nearest(kind, available)} There are: auto, {', '.join(available)}.")
    if not available[kind]:
        raise UserError(f"model.device={wanted}: torch sees no {kind} device here; use model.device=auto")
    if wanted == "cuda" and world_size() > 1:
        return f"cuda:{local_rank()}"  # each rank of a distributed training takes its own GPU
    return wanted


def choose_dtype(wanted: str, device: str, full_training: bool) -> tuple[torch.dtype, str]:
    """(dtype of the base weights, the reason). `auto`: bf16 on a GPU that computes it, else fp16; fp32 on a CPU.

    Weights that are themselves trained (`full_training`) stay fp32: updates of 1e-4 vanish in a bf16 weight. Raises UserError.
    """
    import torch

    if wanted != "auto":
        if wanted not in DTYPES:
            raise UserError(f"model.dtype={wanted}: no such dtype.{nearest(wanted, DTYPES)} There are: auto, bf16, fp16, fp32.")
        return getattr(torch, DTYPES[wanted]), "as asked"
    if full_training:
        return torch.float32, "the weights themselves are trained"
    if device.startswith("cuda"):
        if torch.cuda.is_bf16_supported():
            return torch.bfloat16, "this GPU computes bf16"
        return torch.float16, "this GPU has no bf16"
    return torch.float32, "exact and fastest without a GPU"


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


def mixed_precision(dtype: torch.dtype, device: str, full_training: bool) -> dict[str, bool]:
    """TrainingArguments' bf16/fp16 that fit the base's dtype: adapters are fp32, so half-precision weights need autocast."""
    import torch

    if full_training and device.startswith("cuda") and dtype == torch.float32:
        return {"bf16": torch.cuda.is_bf16_supported(), "fp16": False}
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
