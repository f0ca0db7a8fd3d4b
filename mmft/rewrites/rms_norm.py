"""RMS normalisation over a frozen weight as one operation: y = w * x / sqrt(mean(x^2) + eps), the mean over the last dimension.

Step by step it takes about a dozen passes over memory, forward and backward; here eight. The backward pass keeps x as it came (in half
precision if it came so) and one number for each position.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .base import CLOSE, own_forward


class RmsNormFunction(torch.autograd.Function):
    """`apply(x (..., d), weight (d,) of x's dtype, without a gradient, eps)` -> as x. Computes in fp32, as transformers does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        """scale * (g - x * scale^2 * mean(g x)), where g is the gradient of the normalised values."""
        x, weight, scale = ctx.saved_tensors
        g, x32 = (grad_y * weight).float(), x.float()
        along_x = (g * x32).sum(-1, keepdim=True).mul_(scale**3).div_(-x.shape[-1])
        return g.mul_(scale).addcmul_(x32, along_x).to(x.dtype), None, None


class RmsNorm:
    """The rewrite of RMS norms whose weight is frozen."""

    name = "rms_norm"
    devices: tuple[str, ...] = ()
    gain = "0.97 of a training step; CPU, fp32, 41 M Qwen2-VL, 4 rows, r 16 (python -m benchmarks.rewrites)"

    def candidates(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        return filter(is_rms_norm, model.modules())

    def agrees(self, module: torch.nn.Module) -> bool:
        """In fp32, whatever dtype the weight has: half precision rounds by more than the formulas differ by."""
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        x = torch.randn(2, *weight.shape, generator=torch.Generator().manual_seed(0)).to(weight.device)
        with torch.no_grad():
            expected = own_forward(module, x)
            return bool((RmsNormFunction.apply(x, weight.float(), _eps(module)) - expected).abs().max() <= CLOSE * expected.abs().max())

    def forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = module.weight
        # without a gradient there is nothing to save, and evaluation stays equal, bit for bit, to that of later verbs
        trains = torch.is_grad_enabled() and x.requires_grad and not weight.requires_grad
        if not trains or weight.dtype != x.dtype or weight.device != x.device:
            return own_forward(module, x)
        y: torch.Tensor = RmsNormFunction.apply(x, weight, _eps(module))
        return y


def is_rms_norm(module: torch.nn.Module) -> bool:
    """By its class name and parts: one frozen weight vector and an epsilon."""
    if not type(module).__name__.endswith("RMSNorm") or list(module.children()) or _eps(module) is None:
        return False
    weights = dict(module.named_parameters(recurse=False))
    return list(weights) == ["weight"] and weights["weight"].dim() == 1 and not weights["weight"].requires_grad


def _eps(norm: torch.nn.Module) -> float | None:
    return next((value for name in ("variance_epsilon", "eps") if isinstance(value := getattr(norm, name, None), float)), None)
