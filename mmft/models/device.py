"""Choose device and dtype for this machine, each with the reason that is printed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common.errors import UserError, nearest
from ..system.distributed import local_rank, world_size

if TYPE_CHECKING:
    import torch

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


def mixed_precision(dtype: torch.dtype, device: str, full_training: bool) -> dict[str, bool]:
    """TrainingArguments' bf16/fp16 that fit the base's dtype: adapters are fp32, so half-precision weights need autocast."""
    import torch

    if full_training and device.startswith("cuda") and dtype == torch.float32:
        return {"bf16": torch.cuda.is_bf16_supported(), "fp16": False}
    return {"bf16": dtype == torch.bfloat16, "fp16": dtype == torch.float16}
