"""Rotary position embedding in fewer passes over memory: y = x cos + rotate_half(x) sin, to the bit what transformers computes.

Every family has a function for it in the module of its model. `ways` says which of them may be computed here instead, and
mmft/rewrites/instead.py puts those in their place for as long as it is needed. On a CPU only: there a tower spent an eighth of its time on it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .instead import Ways

BLOCK = 2**17  # values that are worked on at once where nothing is kept: half a megabyte of fp32, with what is made of it inside a core's second cache


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., d), cos and sin that broadcast to it -> y, as x. Products and sums are those of transformers, in its order."""
    half = x.shape[-1] // 2
    y = torch.mul(x, cos, out=y)
    y[..., :half] -= x[..., half:] * sin[..., :half]
    y[..., half:] += x[..., :half] * sin[..., half:]
    return y


class Rotated(torch.autograd.Function):
    """`forward(x (B, heads, S, d), cos, sin)` -> as x. Kept are cos and sin alone; step by step the gradient is about a dozen passes, here five."""

    @staticmethod
    def forward(ctx: Any, x: Any, cos: Any, sin: Any) -> Any:
        ctx.save_for_backward(cos, sin)
        return rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        cos, sin = ctx.saved_tensors
        half = gradient.shape[-1] // 2
        of_x, turned = gradient * cos, gradient * sin
        of_x[..., :half] += turned[..., half:]
        of_x[..., half:] -= turned[..., :half]
        return of_x, None, None


def ways(model: Any) -> Ways:
    """The functions of the modules that this model's classes are from which give what `_language` and `_tower` give."""
    found: Ways = []
    if model.device.type != "cpu":
        return found
    for module in {sys.modules[type(m).__module__] for m in model.modules()}:
        for name, own in (("apply_rotary_pos_emb", _language), ("apply_rotary_pos_emb_vision", _tower)):
            whole = vars(module).get(name)
            if whole is not None and _gives_the_same(whole, own(whole), tower=own is _tower):
                found.append((module, name, own(whole)))
    return found


def _plain(*tensors: torch.Tensor) -> bool:
    """Whether all are fp32, on a CPU, and of whole heads."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.shape[-1] == tensors[0].shape[-1] for t in tensors)


def _language(whole: Callable[..., Any]) -> Callable[..., Any]:
    """For q and k (B, heads, S, d), cos and sin (B, S, d)."""

    def apply(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> Any:
        if not _plain(q, k, cos, sin) or cos.requires_grad:
            return whole(q, k, cos, sin, unsqueeze_dim)
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        return Rotated.apply(q, cos, sin), Rotated.apply(k, cos, sin)

    return apply


def _tower(whole: Callable[..., Any]) -> Callable[..., Any]:
    """For q and k (S, heads, d), cos and sin (S, d), where no gradient is wanted."""

    def apply(q: Any, k: Any, cos: Any, sin: Any) -> Any:
        if not _plain(q, k, cos, sin) or torch.is_grad_enabled():
            return whole(q, k, cos, sin)
        rows = max(1, BLOCK // q[0].numel())
        cosines, sines = cos.unsqueeze(-2).split(rows), sin.unsqueeze(-2).split(rows)
        made = [torch.empty(t.shape, dtype=t.dtype) for t in (q, k)]
        for x, y in zip((q, k), made):
            for parts in zip(x.split(rows), cosines, sines, y.split(rows)):
                rotated(*parts)
        return made[0], made[1]

    return apply


def _gives_the_same(whole: Callable[..., Any], own: Callable[..., Any], tower: bool) -> bool:
    """On made-up values, to the bit; a family that turns part of a head, or neighbours in place of halves, does not."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(*((5, heads, 8) if tower else (2, heads, 5, 8)), generator=draw) for heads in (4, 2))
    cos, sin = (torch.randn(*((5, 8) if tower else (2, 5, 8)), generator=draw) for _ in range(2))
    try:
        with torch.no_grad():
            return all(torch.equal(a, b) for a, b in zip(whole(q, k, cos, sin), own(q, k, cos, sin), strict=True))
    except (TypeError, RuntimeError, IndexError):  # other arguments, other shapes
        return False
