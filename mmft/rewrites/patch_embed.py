"""A convolution over single patches as the matrix product that it is.

Towers of the Qwen families get pictures cut into patches and begin with a Conv3d whose kernel is one patch. Convolution kernels are
made for more than that. The rewrite stands on the loaded model, so training, evaluation and every later verb round alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from .base import CLOSE, own_forward


class PatchEmbed:
    """The rewrite of Conv3d layers that step by the size of their kernel: (N, C, T, P, P) -> (N, out, 1, 1, 1)."""

    name = "patch_embed"
    devices: tuple[str, ...] = ()
    gain = "0.92 of the pass that computes image features; CPU, fp32, 41 M Qwen2-VL, 8 images (python -m benchmarks.rewrites)"

    def candidates(self, model: torch.nn.Module) -> Iterator[torch.nn.Module]:
        return (m for m in model.modules() if type(m) is torch.nn.Conv3d and _steps_by_kernel(m))

    def agrees(self, module: torch.nn.Module) -> bool:
        weight: torch.Tensor = module.weight
        x = torch.randn(2, *weight.shape[1:], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        with torch.no_grad():
            expected = own_forward(module, x)
            close = max(CLOSE, 2 * torch.finfo(weight.dtype).eps)
            return bool((self.forward(module, x) - expected).abs().max() <= close * expected.abs().max())

    def forward(self, module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight: torch.Tensor = module.weight
        bias: torch.Tensor | None = module.bias
        if x.shape[1:] != weight.shape[1:]:  # a larger input: a real convolution
            return own_forward(module, x)
        return F.linear(x.flatten(1), weight.flatten(1), bias).view(len(x), -1, 1, 1, 1)


def _steps_by_kernel(module: torch.nn.Conv3d) -> bool:
    return module.stride == module.kernel_size and module.padding == (0, 0, 0) and module.groups == 1 and set(module.dilation) == {1}
