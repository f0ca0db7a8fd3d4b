"""A gated MLP with its adapters as one operation: y = down(silu(gate(x)) * up(x)), with the products of lora_linear.

Layer by layer, autograd keeps four tensors of the MLP's inner width for each token: the output of gate, its silu, the output of up,
and their product. Here it keeps two, those of gate and up, and computes the others again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from .base import CLOSE, own_forward
from .lora_linear import LinearParts, is_plain_lora, linear_parts, product, product_gradients

T = TypeVar("T")
PartsOf = Callable[[torch.nn.Module, torch.Tensor], LinearParts | None]  # (layer, x or a tensor of its shape) -> its parts

NAMES = ("gate_proj", "up_proj", "down_proj")  # the names that transformers' models give these layers


class GatedProduct(torch.autograd.Function):
    """`apply(x (M, in), parts of gate, up and down, their matrices in this order)` -> (M, out). Dtypes as in LoraProduct."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: Sequence[LinearParts], *matrices: torch.Tensor) -> torch.Tensor:
        gate, up, down = parts
        g, inner_gate = product(x, gate.base, gate.rows, gate.matrices)
        u, inner_up = product(x, up.base, up.rows, up.matrices)
        y, inner_down = product(F.silu(g).mul_(u), down.base, down.rows, down.matrices)
        ctx.parts, ctx.lengths = parts, [len(inner_gate), len(inner_up), len(inner_down)]
        ctx.save_for_backward(x, g, u, *inner_gate, *inner_up, *inner_down, *matrices)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        x, g, u, *rest = ctx.saved_tensors
        gate, up, down = ctx.parts
        inner = _split(rest, ctx.lengths)
        matrices = _split(rest[sum(ctx.lengths) :], [2 * n for n in ctx.lengths])
        wanted = _split(ctx.needs_input_grad[2:], [2 * n for n in ctx.lengths])
        silu = F.silu(g)
        grad_product, down_gradients = product_gradients(silu * u, grad_y, down.base, down.rows, matrices[2], inner[2], wanted[2])
        assert grad_product is not None
        grad_u = silu.mul_(grad_product)
        grad_g = torch.ops.aten.silu_backward(grad_product.mul_(u), g)
        grad_x, gate_gradients = product_gradients(
            x, grad_g, gate.base, gate.rows, matrices[0], inner[0], wanted[0], ctx.needs_input_grad[0] or None
        )
        grad_x, up_gradients = product_gradients(x, grad_u, up.base, up.rows, matrices[1], inner[1], wanted[1], grad_x)
        return (grad_x, None, *gate_gradients, *up_gradients, *down_gradients)


def _split(values: Sequence[T], lengths: Sequence[int]) -> list[Sequence[T]]:
    """Consecutive pieces of these lengths."""
    pieces, start = [], 0
    for n in lengths:
        pieces.append(values[start : start + n])
        start += n
    return pieces


class GatedMlp:
    """The rewrite of gated MLPs in which some layer has an adapter, and all other weights are frozen.

    parts_of: what a layer contributes; the model of jointly trained points has a layer of its own.
    """

    name = "gated_mlp"
    devices: tuple[str, ...] = ()
    gain = "0.96 of a training step; CPU, fp32, 41 M Qwen2-VL, 4 rows, r 16 (python -m benchmarks.rewrites)"

    def __init__(self, parts_of: PartsOf = linear_parts):
        self.parts_of = parts_of

    def candidates(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        by_class: dict[type, list[torch.nn.Module]] = {}
        for mlp in filter(is_gated, model.modules()):
            by_class.setdefault(type(mlp), []).append(mlp)
        # a class is left alone as a whole if one of its MLPs has another kind of adapter
        return (mlp for mlps in by_class.values() if all(map(_is_plain, mlps)) for mlp in mlps)

    def agrees(self, module: torch.nn.Module) -> bool:
        weight = _base(module, "gate_proj").weight
        x = torch.randn(2, weight.shape[-1], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        half = weight.dtype in (torch.float16, torch.bfloat16)
        close = max(CLOSE, 2 * torch.finfo(weight.dtype).eps)
        with torch.no_grad(), torch.autocast(weight.device.type, dtype=weight.dtype if half else None, enabled=half):  # as in training
            y = self._compute(module, x)
            return y is not None and bool((y - own_forward(module, x)).abs().max() <= close * y.abs().max())

    def forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        y = self._compute(module, x)
        return own_forward(module, x) if y is None else y

    def _compute(self, mlp: torch.nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        """None where a layer must compute by itself."""
        # a tensor without memory that has the shape of down's input
        inner = x.new_empty(()).expand(*x.shape[:-1], _base(mlp, "gate_proj").out_features)
        parts = [p for name, like in zip(NAMES, (x, x, inner)) if (p := self.parts_of(getattr(mlp, name), like)) is not None]
        if len(parts) < len(NAMES):
            return None
        y: torch.Tensor = GatedProduct.apply(x.reshape(-1, x.shape[-1]), parts, *(m for p in parts for m in p.matrices))
        return y.view(*x.shape[:-1], -1)


def is_gated(module: torch.nn.Module) -> bool:
    """By its children: the three layers, at least one of them adapted, a SiLU, and nothing else."""
    children = dict(module.named_children())
    layers = [children.pop(name, None) for name in NAMES]
    if len(children) != 1 or list(module.parameters(recurse=False)) or not all(hasattr(m, "base_layer") or type(m) is torch.nn.Linear for m in layers):
        return False
    (activation,) = children.values()
    return any(hasattr(layer, "base_layer") for layer in layers) and type(activation).__name__ in ("SiLU", "SiLUActivation")


def _base(mlp: torch.nn.Module, name: str) -> torch.nn.Linear:
    layer = getattr(mlp, name)
    return getattr(layer, "base_layer", layer)


def _is_plain(mlp: torch.nn.Module) -> bool:
    layers = [getattr(mlp, name) for name in NAMES]
    return all(is_plain_lora(m) if hasattr(m, "base_layer") else not any(p.requires_grad for p in m.parameters()) for m in layers)
