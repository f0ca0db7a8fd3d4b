"""Linear layers over few rows, as a step of decoding has them: on an AMD processor by oneDNN in place of MKL, in fp32.

On x86 torch multiplies fp32 matrices with Intel's MKL, and half precision with oneDNN, which it brings as well. On an AMD EPYC MKL
takes far longer than oneDNN where few rows meet a large weight:

    rows x a weight of 8960 x 1536, ms on two cores    1      4      8      16     32     64
    MKL                                                3.5    7.8    7.4    7.9    11.7   16.3
    oneDNN                                             2.2    2.7    3.0    3.8    5.9    10.1

For hundreds of rows oneDNN gained a tenth, but it keeps about 0.8 MB for every number of rows and every shape of a weight. So rows are
filled up to a multiple of 8 here, and more than 64 rows are left to MKL. Other processors were not measured and are left alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from ..common.private_api import onednn_linear
from ..system.processor import processor_vendor
from .base import CLOSE, own_forward

Linear = Callable[[torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]

MOST_ROWS = 64
FILL = 8
SMALLEST = 2**17  # values of a weight; below, oneDNN takes longer to begin than it gains


@functools.cache
def faster_linear() -> Linear | None:
    """oneDNN's `linear` where this processor gains by it and torch has both libraries; else None."""
    amd = processor_vendor() == "AuthenticAMD"
    return onednn_linear() if amd and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() else None


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`F.linear`: (..., in), (out, in), (out,) -> (..., out)."""
    faster = None if _is_watched() or x.dtype != torch.float32 or not _is_large(weight) else faster_linear()
    if faster is None or not 0 < (rows := x.numel() // x.shape[-1]) <= MOST_ROWS:
        return F.linear(x, weight, bias)
    filled = 1 if rows == 1 else -(-rows // FILL) * FILL
    flat = x.reshape(rows, -1)
    y = faster(F.pad(flat, (0, 0, 0, filled - rows)) if filled > rows else flat, weight, bias)
    return y[:rows].view(*x.shape[:-1], -1)


def _is_large(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= SMALLEST


def _is_watched() -> bool:
    """Whether autograd, autocast or a compiler has to see an operation that it knows."""
    return torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()


class FewRows:
    """The rewrite of the large linear layers of the loaded model, for every verb."""

    name = "few_rows"
    devices: tuple[str, ...] = ("cpu",)
    gain = "0.84, 0.75 and 0.85 of a step of decoding with 1, 4 and 16 rows; fp32, 41 M Qwen2-VL, two cores of an AMD EPYC (python -m benchmarks.rewrites --decoding)"

    def candidates(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        large = (m for m in model.modules() if type(m) is torch.nn.Linear and _is_large(m.weight))
        return iter(()) if faster_linear() is None else large

    def agrees(self, module: torch.nn.Module) -> bool:
        layer: Any = module
        x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = own_forward(layer, x)
            return bool((self.forward(layer, x) - expected).abs().max() <= CLOSE * expected.abs().max())

    def forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        layer: Any = module
        return linear(x, layer.weight, layer.bias)
