"""The convolution over single patches as the product of matrices that it is.

The Qwen families cut pictures into patches before the model sees them, and their tower begins with a Conv3d whose kernel is one
patch. Convolution kernels are made for more than that: on a CPU the same numbers as a product took a quarter of the time.
It stands in the loaded model, not in one pass of it: training, measuring and every later verb round alike.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


class PatchProduct(torch.nn.Conv3d):
    """A Conv3d that is given one kernel's size at a time: (N, C, T, P, P) -> (N, out, 1, 1, 1). Anything else is convolved as ever."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1:] != self.weight.shape[1:]:
            return super().forward(x)
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias).view(len(x), -1, 1, 1, 1)


def as_products(model: Any) -> int:
    """Let the convolutions of a model that are called so compute by `PatchProduct`; their number. Weights and names stay."""
    found = [m for m in model.modules() if type(m) is torch.nn.Conv3d and _steps_by_its_size(m)]
    for convolution in found:
        convolution.__class__ = PatchProduct
    return len(found)


def _steps_by_its_size(convolution: Any) -> bool:
    return convolution.stride == convolution.kernel_size and convolution.padding == (0, 0, 0) and convolution.groups == 1 and set(convolution.dilation) == {1}
