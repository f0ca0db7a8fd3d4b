"""A linear layer and the LoRA adapters over it as one operation, with fewer passes over memory than peft's layers.

    y[rows of k] = W x[rows of k] + b + scaling_k B_k A_k dropout_k(x[rows of k])

One adapter over all rows is a normal run. Several adapters, each over its own rows, are sweep points that are trained jointly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .base import CLOSE, own_forward
from .few_rows import linear
from .seeded_dropout import SeededDropout, ones_and_zeros

THIN = 16  # columns of a product below which a CPU computes its transpose faster


@dataclass
class AdapterRows:
    """One adapter's share of the operation: its rows `start`:`stop` of x (M, in), its scaling, its dropout.

    kept: True where dropout keeps a value of these rows, None without dropout; kept values are multiplied by `factor`.
    training: gradients are wanted. Otherwise the operations are those of peft's layers, bit for bit, so that evaluation while
    training equals evaluation by later verbs.
    """

    start: int
    stop: int
    scaling: float
    kept: torch.Tensor | None = None
    factor: float = 1.0
    training: bool = field(default_factory=torch.is_grad_enabled)

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Its rows of x."""
        return x[self.start : self.stop]

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """x with zeros where dropout removes a value; `factor` is applied to the narrow side of the product."""
        return x if self.kept is None else ones_and_zeros(self.kept, x.dtype).mul_(x)


@dataclass
class LinearParts:
    """A frozen linear layer, the rows of its adapters, and their matrices A_1, B_1, A_2, ..."""

    base: torch.nn.Linear
    rows: list[AdapterRows]
    matrices: list[torch.Tensor]


def thin_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right, (M, r). On a CPU with a small r its transpose is computed: MKL took 2 to 5 times as long for the product itself.

    Below 8 columns `right` is made contiguous first: without that the transpose took up to 5 times as long, at r = 6.
    """
    if right.shape[1] >= THIN or left.device.type != "cpu":
        return left @ right
    transposed = right.t() if right.shape[1] >= 8 else right.t().contiguous()
    return (transposed @ left.t()).t()


def product(
    x: torch.Tensor, base: torch.nn.Linear, rows: Sequence[AdapterRows], matrices: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(y (M, out), the output of each A: (its rows, r)); matrices: A_1, B_1, A_2, ..."""
    y = linear(x, base.weight, base.bias)
    inner = []
    for part, a, b in zip(rows, matrices[::2], matrices[1::2]):
        x_k, a, b = part.dropped(part.of(x)), a.to(x.dtype), b.to(x.dtype)
        h = thin_product(x_k, a.t()) if part.training else x_k @ a.t()
        inner.append(h)
        part.of(y).addmm_(h, b.t(), alpha=part.scaling * part.factor)
    return y, inner


def product_gradients(
    x: torch.Tensor, grad_y: torch.Tensor, base: torch.nn.Linear, rows: Sequence[AdapterRows], matrices: Sequence[torch.Tensor],
    inner: Sequence[torch.Tensor], wanted: Sequence[bool], grad_x: torch.Tensor | bool | None = True,
) -> tuple[torch.Tensor | None, list[torch.Tensor | None]]:  # fmt: skip
    """(gradient of x, gradients of the matrices that are `wanted`), from the gradient of y (M, out).

    grad_x: a tensor that the gradient of x is added to in place, True for a new one, None where it is not needed.
    """
    total: torch.Tensor | None = None
    if grad_x is True:
        total = grad_y @ base.weight
    elif isinstance(grad_x, torch.Tensor):
        total = grad_x.addmm_(grad_y, base.weight)
    gradients: list[torch.Tensor | None] = []
    for i, part in enumerate(rows):
        grad_k, alpha, dtype = part.of(grad_y), part.scaling * part.factor, matrices[2 * i].dtype
        a, b = (matrix.to(x.dtype) for matrix in matrices[2 * i : 2 * i + 2])
        grad_h = thin_product(grad_k, b).mul_(alpha)
        gradients.append((grad_h.t() @ part.dropped(part.of(x))).to(dtype) if wanted[2 * i] else None)
        # as the transpose of h^T g, for every r: MKL took 1.2 to 3 times as long for g^T h
        gradients.append((inner[i].t() @ grad_k).mul_(alpha).t().to(dtype) if wanted[2 * i + 1] else None)
        if total is None:
            continue
        if part.kept is None:
            part.of(total).addmm_(grad_h, a)
        else:
            part.of(total).add_(part.dropped(grad_h @ a))
    return total, gradients


class LoraProduct(torch.autograd.Function):
    """`apply(x (M, in), base (a frozen torch.nn.Linear), rows, A_1 (r_1, in), B_1 (out, r_1), A_2, ...)` -> (M, out).

    Everything is in the dtype of x and base. Matrices of another dtype (fp32 adapters under autocast) are cast to it, and their
    gradients back. The backward pass keeps x once for all layers that read it, the dropout masks (a byte for each value) and the
    products of rank r. peft's layers also keep x after dropout, once for each layer, and what each adapter adds to y.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, base: torch.nn.Linear, rows: list[AdapterRows], *matrices: torch.Tensor) -> torch.Tensor:
        y, inner = product(x, base, rows, matrices)
        ctx.base, ctx.rows = base, rows
        ctx.save_for_backward(x, *matrices, *inner)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        x, *rest = ctx.saved_tensors
        n, needs = 2 * len(ctx.rows), ctx.needs_input_grad
        grad_x, gradients = product_gradients(x, grad_y, ctx.base, ctx.rows, rest[:n], rest[n:], needs[3:], needs[0] or None)
        return (grad_x, None, None, *gradients)


def single_dtype(x: torch.Tensor, base: torch.nn.Linear, *weights: torch.Tensor) -> bool:
    """Whether all products are computed in the dtype that x and base have.

    Autocast to that dtype casts the adapters' weights to it. Without autocast peft casts x to the dtype of the adapters, which
    is what evaluation and later verbs compute with fp32 adapters on a half-precision base.
    """
    device = x.device.type
    if base.weight.dtype != x.dtype:
        return False
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == x.dtype
    return all(w.dtype == x.dtype for w in weights)


def is_plain_lora(layer: torch.nn.Module) -> bool:
    """Whether a LoRA layer is peft's own over a plain frozen linear layer (quantised layers compute their product themselves)."""
    from peft.tuners.lora import Linear

    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear:
        return False
    biased = any(module.bias is not None for module in layer.lora_B.values())  # lora_bias
    return not (biased or any(p.requires_grad for p in layer.base_layer.parameters()))


def lora_parts(layer: Any, x: torch.Tensor) -> LinearParts | None:
    """The parts of a LoRA layer for x (..., in), of which only shape, dtype and device are read.

    None where the layer must compute by itself: merged, disabled, several active adapters, a variant such as DoRA, mixed dtypes,
    or another dropout.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or layer.lora_variant.get(name) is not None:
        return None
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    dropout = layer.lora_dropout[name]
    if not single_dtype(x, layer.base_layer, a) or not isinstance(dropout, (SeededDropout, torch.nn.Identity)):
        return None
    rows = AdapterRows(0, x.numel() // x.shape[-1], layer.scaling[name])
    kept = dropout.kept(x) if isinstance(dropout, SeededDropout) else None
    if kept is not None and isinstance(dropout, SeededDropout):
        rows.kept, rows.factor = kept.reshape(-1, x.shape[-1]), dropout.factor
    return LinearParts(layer.base_layer, [rows], [a, b])


def linear_parts(layer: torch.nn.Module, x: torch.Tensor) -> LinearParts | None:
    """The parts of a LoRA layer, or of a linear layer without an adapter."""
    if type(layer) is torch.nn.Linear:
        return LinearParts(layer, [], []) if single_dtype(x, layer) else None
    return lora_parts(layer, x)


class LoraLinear:
    """The rewrite of peft's LoRA layers over plain linear layers."""

    name = "lora_linear"
    devices: tuple[str, ...] = ()
    gain = "0.99 of a training step, and the least memory kept for backward in half precision; CPU, fp32, 41 M Qwen2-VL, 4 rows, r 16 (python -m benchmarks.rewrites)"

    def candidates(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        from peft.tuners.lora import LoraLayer

        return (m for m in model.modules() if isinstance(m, LoraLayer) and is_plain_lora(m))

    def agrees(self, module: torch.nn.Module) -> bool:
        layer: Any = module
        base: torch.nn.Linear = layer.base_layer
        x = torch.randn(2, base.in_features, generator=torch.Generator().manual_seed(0)).to(base.weight.device, base.weight.dtype)
        was_training, _ = layer.training, layer.train(False)
        try:
            with torch.no_grad():
                y, expected = self.forward(layer, x), own_forward(layer, x)
        finally:
            layer.train(was_training)
        return bool((y - expected).abs().max() <= max(CLOSE, 2 * torch.finfo(y.dtype).eps) * expected.abs().max())

    def forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        parts = lora_parts(module, x)
        if parts is None:
            return own_forward(module, x)
        y: torch.Tensor = LoraProduct.apply(x.reshape(-1, x.shape[-1]), parts.base, parts.rows, *parts.matrices)
        return y.view(*x.shape[:-1], -1)
