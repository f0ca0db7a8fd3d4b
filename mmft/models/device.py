"""What this machine can do: device, dtype and quantisation, each choice with the reason that is printed."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from ..common.errors import UserError, nearest
from ..system import startup
from ..system.distributed import local_rank, world_size

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}


def choose_device(wanted: str) -> str:
    """`auto` -> cuda, mps or cpu, whichever is there first. Errors raised: UserError for a device that is not."""
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, there in has.items() if there)
    kind = wanted.split(":")[0]
    if kind not in has:
        raise UserError(f"model.device={wanted}: no such device.{nearest(kind, has)} There are: auto, {', '.join(has)}.")
    if not has[kind]:
        raise UserError(f"model.device={wanted}: torch sees no {kind} device here; use model.device=auto")
    if wanted == "cuda" and world_size() > 1:
        return f"cuda:{local_rank()}"  # of several processes that train one model, each its own
    return wanted


def choose_dtype(wanted: str, device: str, full_training: bool) -> tuple[Any, str]:
    """(torch dtype of the base weights, the reason). `auto`: bf16 where the GPU computes it, else fp16; fp32 on a CPU.

    Weights that are themselves trained (`full_training`) stay fp32: steps of 1e-4 vanish in a bf16 weight.
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


def choose_quantization(wanted: dict | None, device: str) -> tuple[Any | None, str]:
    """(BitsAndBytesConfig or None, one line when the machine cannot do what was asked)."""
    wanted = {k: v for k, v in (wanted or {}).items() if v is not None}
    bits = [k for k in ("load_in_8bit", "load_in_4bit") if wanted.get(k)]
    if not bits:
        return None, ""
    if len(bits) == 2:
        raise UserError("model.quantization: load_in_8bit and load_in_4bit exclude each other; keep one")
    startup.with_bitsandbytes()
    reason = _why_not(device)
    if reason:
        return None, f"{bits[0]} is not possible here ({reason}); loading unquantised weights instead"
    from transformers import BitsAndBytesConfig

    # says at every 8-bit layer of every forward pass that fp32 inputs are cast, which is what was asked for
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    kind = wanted.get("bnb_4bit_quant_type", "nf4")
    if kind not in ("nf4", "fp4"):
        raise UserError(f"model.quantization.bnb_4bit_quant_type={kind}: must be nf4 or fp4")
    try:
        return BitsAndBytesConfig(**wanted), ""
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model.quantization: {' '.join(str(error).split())}") from None


def _why_not(device: str) -> str:
    if device.startswith("mps"):
        return "bitsandbytes has no kernels for mps"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed; pip install bitsandbytes"
    try:
        import bitsandbytes  # noqa: F401  # it fails at import on platforms without a library of its own
    except Exception as error:
        return f"bitsandbytes does not load: {str(error).splitlines()[0]}"
    return ""


def mixed_precision(dtype: Any, device: str, full_training: bool) -> dict[str, bool]:
    """TrainingArguments' bf16/fp16 that fit the base's dtype: adapters are fp32, so half weights need autocast."""
    import torch

    if full_training and device.startswith("cuda") and dtype == torch.float32:
        return {"bf16": torch.cuda.is_bf16_supported(), "fp16": False}
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
