"""A gated MLP with its adapters as one operation: y = down(silu(gate(x)) * up(x)), by the products of mmft/rewrites/lora_linear.py.

Layer by layer, autograd keeps four tensors of the MLP's inner width for each token: gate's output, its silu, up's output, and
their product. Here two are kept, gate's and up's, and the others are made again in the backward pass.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .lora_linear import Share, fusable, gradients, multiplied, one_dtype, share

Shares = Callable[[Any, torch.Tensor], Share | None]  # (layer, x or something of its shape) -> what it puts into a product

NAMES = ("gate_proj", "up_proj", "down_proj")  # as transformers' families with such an MLP call them
CLOSE = 1e-5  # of the largest output: more of a difference than rounding makes in fp32


class Gated(torch.autograd.Function):
    """`forward(x (M, in), shares of gate, up and down, their adapters' matrices in this order)` -> (M, out), in dtypes as `Product`."""

    @staticmethod
    def forward(ctx: Any, x: Any, shares: list[Share], *adapters: Any) -> Any:
        gate, up, down = shares
        g, of_gate = multiplied(x, gate.base, gate.parts, gate.adapters)
        u, of_up = multiplied(x, up.base, up.parts, up.adapters)
        y, of_down = multiplied(F.silu(g).mul_(u), down.base, down.parts, down.adapters)
        ctx.shares, ctx.lengths = shares, [len(of_gate), len(of_up), len(of_down)]
        ctx.save_for_backward(x, g, u, *of_gate, *of_up, *of_down, *adapters)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, g, u, *rest = ctx.saved_tensors
        gate, up, down = ctx.shares
        inner, adapters = _divided(rest, ctx.lengths), _divided(rest[sum(ctx.lengths) :], [2 * n for n in ctx.lengths])
        wanted = _divided(ctx.needs_input_grad[2:], [2 * n for n in ctx.lengths])
        silu = F.silu(g)
        of_a, of_down = gradients(silu * u, gradient, down.base, down.parts, adapters[2], inner[2], wanted[2])
        of_u = silu.mul_(of_a)
        of_g = torch.ops.aten.silu_backward(of_a.mul_(u), g)
        of_x, of_gate = gradients(x, of_g, gate.base, gate.parts, adapters[0], inner[0], wanted[0], ctx.needs_input_grad[0] or None)
        of_x, of_up = gradients(x, of_u, up.base, up.parts, adapters[1], inner[1], wanted[1], of_x)
        return (of_x, None, *of_gate, *of_up, *of_down)


def _divided(values: Any, lengths: list[int]) -> list[Any]:
    """Consecutive pieces of these lengths."""
    pieces, start = [], 0
    for n in lengths:
        pieces.append(values[start : start + n])
        start += n
    return pieces


def fuse(model: Any) -> set[type]:
    """Let the gated MLPs in which something is adapted compute by `Gated`; their classes.

    A class is taken when all adapters in it are plain ones over frozen layers, and when an MLP of it, on two made-up rows,
    gives what its own forward gives.
    """
    found: dict[type, list[Any]] = {}
    for mlp in filter(_is_gated, model.modules()):
        found.setdefault(type(mlp), []).append(mlp)
    kinds = {kind for kind, mlps in found.items() if all(map(_is_plain, mlps)) and _gives_the_same(mlps[0])}
    take(model, kinds, of_layer)
    return kinds


def take(model: Any, kinds: set[type], shares: Shares) -> None:
    """`Gated` for the MLPs of these classes, with what `shares` says of their layers."""
    for mlp in model.modules():
        if type(mlp) in kinds and _is_gated(mlp):
            mlp.forward = types.MethodType(functools.partial(_forward, shares=shares), mlp)


def of_layer(layer: Any, x: torch.Tensor) -> Share | None:
    """The share of a LoRA layer, or of a linear layer without an adapter."""
    if type(layer) is torch.nn.Linear:
        return Share(layer, [], []) if one_dtype(x, layer) else None
    return share(layer, x)


def _is_gated(module: Any) -> bool:
    """By its parts: three layers called as usual, one of them adapted, and a SiLU; nothing else."""
    children = dict(module.named_children())
    layers = [children.pop(name, None) for name in NAMES]
    if len(children) != 1 or list(module.parameters(recurse=False)) or not all(hasattr(m, "base_layer") or type(m) is torch.nn.Linear for m in layers):
        return False
    (activation,) = children.values()
    return any(hasattr(layer, "base_layer") for layer in layers) and type(activation).__name__ in ("SiLU", "SiLUActivation")


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _is_plain(mlp: Any) -> bool:
    return all(fusable(m) if hasattr(m, "base_layer") else not any(p.requires_grad for p in m.parameters()) for m in (getattr(mlp, n) for n in NAMES))


def _gives_the_same(mlp: Any) -> bool:
    weight = _base(mlp.gate_proj).weight
    x = torch.randn(2, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    half = weight.dtype in (torch.float16, torch.bfloat16)
    close = max(CLOSE, 2 * torch.finfo(weight.dtype).eps)
    with torch.no_grad(), torch.autocast(weight.device.type, dtype=weight.dtype if half else None, enabled=half):  # as it is trained
        y = _operation(mlp, x, of_layer)
        return y is not None and bool((y - type(mlp).forward(mlp, x)).abs().max() <= close * y.abs().max())


def _operation(mlp: Any, x: torch.Tensor, shares: Shares) -> torch.Tensor | None:
    """None where a layer must compute by itself."""
    wide = x.new_empty(()).expand(*x.shape[:-1], _base(mlp.gate_proj).out_features)  # stands for what down will see
    own = [s for name, like in zip(NAMES, (x, x, wide)) if (s := shares(getattr(mlp, name), like)) is not None]
    if len(own) < len(NAMES):
        return None
    y = Gated.apply(x.reshape(-1, x.shape[-1]), own, *(t for s in own for t in s.adapters))
    return y.view(*x.shape[:-1], -1)


def _forward(mlp: Any, x: torch.Tensor, shares: Shares) -> torch.Tensor:
    y = _operation(mlp, x, shares)
    return type(mlp).forward(mlp, x) if y is None else y
