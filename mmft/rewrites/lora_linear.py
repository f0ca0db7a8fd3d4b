"""A linear layer and the LoRA adapters over it as one operation, with fewer passes over memory than peft's layer by layer.

    y[rows of k] = W x[rows of k] + b + scaling_k B_k A_k dropout_k(x[rows of k])

One adapter over all rows is a run of its own; several, each over its own rows, are points of a sweep trained in step.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from ..adapters.seeded_dropout import SeededDropout, ones_and_zeros

THIN = 16  # columns of a product; from here on the one is as fast as the other


@dataclass
class Part:
    """One adapter's share of a product: its rows `start`:`stop` of x (M, in), its scaling, its dropout.

    kept: True where dropout keeps a value of those rows, or None without dropout; what is kept is multiplied by `factor`.
    """

    start: int
    stop: int
    scaling: float
    kept: torch.Tensor | None = None
    factor: float = 1.0
    trains: bool = field(default_factory=torch.is_grad_enabled)  # else what is measured is to the bit what peft's layers give later verbs

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x[self.start : self.stop]

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x with zeros where dropout takes a value away; `factor` is left to the narrow side of the product."""
        return x if self.kept is None else ones_and_zeros(self.kept, x.dtype).mul_(x)


def thin(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, (M, r). On a CPU its transpose is computed where r is small: MKL was measured to take 2 to 5 times as long for the product itself.

    Below 8 columns it is laid out in rows first: without that the transpose took up to 5 times as long, for r = 6.
    """
    if right.shape[1] >= THIN or left.device.type != "cpu":
        return left @ right
    across = right.t() if right.shape[1] >= 8 else right.t().contiguous()
    return (across @ left.t()).t()


def multiplied(x: Any, base: Any, parts: list[Part], adapters: Sequence[Any]) -> tuple[Any, list[Any]]:
    """(y (M, out), what each part's A makes of x, (its rows, r)); adapters: A_1, B_1, A_2, ..."""
    y = F.linear(x, base.weight, base.bias)
    inner = []
    for part, a, b in zip(parts, adapters[::2], adapters[1::2]):
        own, a, b = part.dropped(part.of(x)), a.to(x.dtype), b.to(x.dtype)
        h = thin(own, a.t()) if part.trains else own @ a.t()
        inner.append(h)
        part.of(y).addmm_(h, b.t(), alpha=part.scaling * part.factor)
    return y, inner


def gradients(
    x: Any, gradient: Any, base: Any, parts: list[Part], adapters: Sequence[Any], inner: Sequence[Any], wanted: Sequence[bool], of_x: Any = True
) -> tuple[Any, list[Any]]:
    """(gradient of x, gradients of the adapters' matrices where they are `wanted`), of the gradient of y (M, out).

    of_x: a tensor that the gradient of x is added to in place, True for a new one, or None where it is not needed.
    """
    if of_x is True:
        of_x = gradient @ base.weight
    elif of_x is not None:
        of_x.addmm_(gradient, base.weight)
    found = []
    for i, part in enumerate(parts):
        own, alpha, dtype = part.of(gradient), part.scaling * part.factor, adapters[2 * i].dtype
        a, b = (matrix.to(x.dtype) for matrix in adapters[2 * i : 2 * i + 2])
        narrow = thin(own, b).mul_(alpha)
        found.append((narrow.t() @ part.dropped(part.of(x))).to(dtype) if wanted[2 * i] else None)
        # as the transpose of h^T g, whatever r is: MKL was measured to take 1.2 to 3 times as long for g^T h
        found.append((inner[i].t() @ own).mul_(alpha).t().to(dtype) if wanted[2 * i + 1] else None)
        if of_x is None:
            continue
        if part.kept is None:
            part.of(of_x).addmm_(narrow, a)
        else:
            part.of(of_x).add_(part.dropped(narrow @ a))
    return of_x, found


class Product(torch.autograd.Function):
    """`forward(x (M, in), base (a frozen torch.nn.Linear), parts, A_1 (r_1, in), B_1 (out, r_1), A_2, ...)` -> (M, out).

    All in the dtype of x and base; adapters of another (fp32 ones, trained under autocast) are cast to it, their gradients back.
    Kept for the backward pass: x once for all layers that read it, the masks (a byte a value), and the products of rank r;
    peft's way keeps x after dropout, too, once for each layer, and what each adapter adds to y.
    """

    @staticmethod
    def forward(ctx: Any, x: Any, base: Any, parts: list[Part], *adapters: Any) -> Any:
        y, inner = multiplied(x, base, parts, adapters)
        ctx.base, ctx.parts = base, parts
        ctx.save_for_backward(x, *adapters, *inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Any) -> Any:
        x, *rest = ctx.saved_tensors
        n, needs = 2 * len(ctx.parts), ctx.needs_input_grad
        of_x, found = gradients(x, gradient, ctx.base, ctx.parts, rest[:n], rest[n:], needs[3:], needs[0] or None)
        return (of_x, None, None, *found)


def plain(layer: Any, x: torch.Tensor) -> bool:
    """Whether a LoRA layer does now, for this x, what `Product` does: one adapter, nothing merged or switched off, one dtype."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    if name not in layer.lora_A or layer.lora_variant.get(name) is not None:
        return False
    return one_dtype(x, layer.base_layer, layer.lora_A[name].weight)


def one_dtype(x: torch.Tensor, base: Any, *weights: torch.Tensor) -> bool:
    """Whether all products here are computed in the dtype that x and base have.

    Autocast to that dtype casts the adapters' weights, of any dtype, to it. Without autocast peft casts x to theirs, which is
    what measuring and later verbs compute with fp32 adapters on a half-precision base.
    """
    kind = x.device.type
    if base.weight.dtype != x.dtype:
        return False
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind) == x.dtype
    return all(w.dtype == x.dtype for w in weights)


def fusable(layer: Any) -> bool:
    """By its kind: peft's LoRA over a plain frozen linear layer (quantised ones compute their product themselves)."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear:
        return False
    biased = any(module.bias is not None for module in layer.lora_B.values())  # lora_bias
    return not (biased or any(p.requires_grad for p in layer.base_layer.parameters()))


def fuse(model: Any) -> int:
    """Let the LoRA layers of a PeftModel compute by `Product` where they may; the number of layers that do."""
    from peft.tuners.lora import LoraLayer

    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and fusable(m)]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)
    return len(layers)


@dataclass
class Share:
    """What a layer puts into a product: its frozen linear layer, its adapters' parts, and their matrices A_1, B_1, A_2, ..."""

    base: Any
    parts: list[Part]
    adapters: list[torch.Tensor]


def share(layer: Any, x: torch.Tensor) -> Share | None:
    """That of a LoRA layer for x (..., in), of which only shape, dtype and device are looked at; None where it must compute by itself."""
    if not plain(layer, x):
        return None
    (name,) = layer.active_adapters
    dropout = layer.lora_dropout[name]
    if not isinstance(dropout, (SeededDropout, torch.nn.Identity)):
        return None
    part = Part(0, x.numel() // x.shape[-1], layer.scaling[name])
    kept = dropout.kept(x) if isinstance(dropout, SeededDropout) else None
    if kept is not None:
        part.kept, part.factor = kept.reshape(-1, x.shape[-1]), dropout.factor
    return Share(layer.base_layer, [part], [layer.lora_A[name].weight, layer.lora_B[name].weight])


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    own = share(layer, x) if not (args or kwargs) else None
    if own is None:
        return type(layer).forward(layer, x, *args, **kwargs)
    y = Product.apply(x.reshape(-1, x.shape[-1]), own.base, own.parts, *own.adapters)
    return y.view(*x.shape[:-1], -1)
