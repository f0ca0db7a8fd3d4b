"""RMS normalisation over a frozen weight as one operation: y = w * x / sqrt(mean(x^2) + eps), the mean over the last dimension.

Step by step it is about a dozen passes over memory, forward and back; here eight. Kept for the backward pass are x as it came,
in half precision where it came so, and one number a position.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .gated_mlp import CLOSE


class Normalised(torch.autograd.Function):
    """`forward(x (..., d), weight (d,) of x's dtype, without a gradient, eps)` -> as x. In fp32 inside, as transformers computes it."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float) -> Any:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        """scale * (g - x * scale^2 * mean(g x)), with g the gradient of what was normalised."""
        x, weight, scale = ctx.saved_tensors
        g, wide = (gradient * weight).float(), x.float()
        along = (g * wide).sum(-1, keepdim=True).mul_(scale**3).div_(-x.shape[-1])
        return g.mul_(scale).addcmul_(wide, along).to(x.dtype), None, None


def fuse(model: Any) -> set[type]:
    """Let the RMS norms over frozen weights compute by `Normalised`; their classes: those that, on two made-up rows, give what their own forward gives."""
    first: dict[type, Any] = {}
    for norm in filter(_is_rms, model.modules()):
        first.setdefault(type(norm), norm)
    kinds = {kind for kind, norm in first.items() if _gives_the_same(norm)}
    take(model, kinds)
    return kinds


def take(model: Any, kinds: set[type]) -> None:
    """`Normalised` for the norms of these classes."""
    for norm in model.modules():
        if type(norm) in kinds and _is_rms(norm):
            norm.forward = types.MethodType(functools.partial(_forward, eps=_eps(norm)), norm)


def _eps(norm: Any) -> float | None:
    return next((value for name in ("variance_epsilon", "eps") if isinstance(value := getattr(norm, name, None), float)), None)


def _is_rms(module: Any) -> bool:
    """By its name and parts: one vector of weights that is not trained, and an epsilon."""
    if not type(module).__name__.endswith("RMSNorm") or list(module.children()) or _eps(module) is None:
        return False
    weights = dict(module.named_parameters(recurse=False))
    return list(weights) == ["weight"] and weights["weight"].dim() == 1 and not weights["weight"].requires_grad


def _gives_the_same(norm: Any) -> bool:
    """In fp32, whatever the weight is in: half precision rounds by more than formulas differ by."""
    weight = norm.weight
    x = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
    with torch.no_grad():
        wanted = type(norm).forward(norm, x)
        return bool((Normalised.apply(x, weight.float(), _eps(norm)) - wanted).abs().max() <= CLOSE * wanted.abs().max())


def _forward(norm: Any, x: torch.Tensor, eps: Any) -> torch.Tensor:
    # without a gradient there is nothing to save, and what is measured here is to the bit what later verbs compute
    trains = torch.is_grad_enabled() and x.requires_grad and not norm.weight.requires_grad
    if not trains or norm.weight.dtype != x.dtype or norm.weight.device != x.device:
        return type(norm).forward(norm, x)
    return Normalised.apply(x, norm.weight, eps)
