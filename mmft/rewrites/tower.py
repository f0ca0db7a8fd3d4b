"""The pass through a frozen tower with less memory moved: on a CPU its MLPs work on some rows at a time, and so do rotary positions.

What is measured in training is to the bit what later verbs measure from pixels, so nothing here may round otherwise than the
tower's own forward. (What does is changed in the loaded model, for all passes of it: mmft/rewrites/patch_embed.py.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.activations import QuickGELUActivation

from ..common.model_parts import part_of
from . import rotary
from .instead import Ways
from .last_layer import dense

# Values of an MLP's inner width that are worked on at once on a CPU: 2 MB of fp32, which a core's second cache about holds. Blocks of 256,
# 512 and 1024 rows took 0.91, 0.86 and 0.90 of the pass with whole MLPs of width 977, and 0.94, 1.01 and 0.88 for width 1280, where one
# round differed from the next by more. With fewer rows products become slower.
BLOCK, FEWEST = 2**19, 256


def ways(model: Any) -> Ways:
    """What may be computed otherwise in this model before its language part; nothing that hooks have been put around."""
    if model.device.type != "cpu":
        return []
    found = rotary.ways(model)
    apart: dict[type, bool] = {}  # whether rows may be computed apart, by the class of the MLP
    for name, module in model.named_modules():
        if part_of(name) in ("language", "other") or "forward" in vars(module):
            continue
        if name.rpartition(".")[2] == "mlp" and dense(module):
            rows = max(FEWEST, BLOCK // _inner(module))
            if type(module) not in apart:
                apart[type(module)] = _gives_the_same(module, rows)
            if apart[type(module)]:
                found.append((module, "forward", functools.partial(_blocks, module.forward, rows)))
        elif type(module) is QuickGELUActivation:
            found.append((module, "forward", _quick_gelu))
    return found


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x), in one new tensor in place of three."""
    return (1.702 * x).sigmoid_().mul_(x)


def _layers(mlp: Any) -> list[torch.nn.Linear]:
    return [m for m in mlp.modules() if isinstance(m, torch.nn.Linear)]


def _inner(mlp: Any) -> int:
    """The width of its widest layer."""
    return max(layer.out_features for layer in _layers(mlp))


def _gives_the_same(mlp: Any, rows: int) -> bool:
    """Whether made-up rows come out to the bit the same in blocks; not asked of packed 4-bit weights, which are left whole.

    It depends on the processor: MKL was seen to round alike for any number of rows on an AMD EPYC, and not on an Intel Xeon,
    where blocks took 1.05 to 1.07 of the time besides.
    """
    first = _layers(mlp)[0]
    if not first.weight.is_floating_point():
        return False
    x = torch.randn(4 * rows + 3, first.in_features, generator=torch.Generator().manual_seed(0)).to(first.weight.device, first.weight.dtype)
    with torch.no_grad():
        return torch.equal(mlp(x), torch.cat([mlp(block) for block in x.split(rows)]))


def _blocks(whole: Callable[[torch.Tensor], torch.Tensor], rows: int, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, x.shape[-1])
    if len(flat) <= rows:
        return whole(x)
    return torch.cat([whole(block) for block in flat.split(rows)]).view(*x.shape[:-1], -1)
