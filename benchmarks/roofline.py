"""Predict a step's time on a GPU from counted operations: arithmetic, memory traffic, and kernels that must be launched.

Operations are counted while a step runs on the CPU, at the model's true widths and with few layers and rows. Every count is linear in the
layers of both parts and in the rows, so a few small runs give that of the whole model. What is not counted: kernels that a GPU fuses or
splits, and the time of the host's Python between two steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry


@dataclass(frozen=True)
class Machine:
    """flops: dense bf16 operations a second. bandwidth: bytes a second. share: of the operations a second that products of this size reach.
    launch: seconds from one kernel to the next where the host decides."""

    name: str
    flops: float
    bandwidth: float
    share: float
    launch: float


# 989 TFLOP/s and 4.8 TB/s are from NVIDIA's data sheet. Half of the first and 7 us for a kernel of eager PyTorch are assumed.
H200 = Machine("H200", 989e12, 4.8e12, 0.5, 7e-6)
LOOKUPS = ("aten::embedding", "aten::index_select", "aten::index", "aten::gather")  # read as much as they write, not their whole table


@dataclass(frozen=True)
class Counts:
    """flops: of products. weights: bytes that products read and write. values: bytes that other kernels read and write. kernels: their number."""

    flops: float = 0.0
    weights: float = 0.0
    values: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Counts)))

    def __mul__(self, times: float) -> Counts:
        return Counts(*(times * getattr(self, f.name) for f in fields(Counts)))

    def __sub__(self, other: Counts) -> Counts:
        return self + other * -1

    def seconds(self, machine: Machine) -> float:
        """The host launches kernels while the GPU computes, so the slower of the two decides."""
        busy = max(self.flops / (machine.flops * machine.share), self.weights / machine.bandwidth) + self.values / machine.bandwidth
        return max(busy, self.kernels * machine.launch)


class Counting(TorchDispatchMode):
    """Counts what runs inside `with`. scale: bytes on the GPU for each byte here; 0.5 where fp32 here is bf16 there."""

    def __init__(self, scale: float = 0.5):
        super().__init__()
        self.scale, self.counts = scale, Counts()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or name in ("aten::detach", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::empty"):
            return result
        tensors = [t for t in tree_flatten((args, kwargs, result))[0] if isinstance(t, torch.Tensor)]
        if name in LOOKUPS:
            tensors = [result, result]
        size = self.scale * sum(t.numel() * t.element_size() for t in tensors)
        formula = flop_registry.get(func._overloadpacket)
        self.counts += Counts(formula(*args, **kwargs, out_val=result), size, 0, 1) if formula else Counts(0, 0, size, 1)
        return result


def counted(work: Callable[[], object]) -> Counts:
    with Counting() as counting:
        work()
    return counting.counts


def at_depth(count: Callable[[int, int], Counts], text: int, vision: int) -> Counts:
    """The counts of `text` and `vision` layers. count: of the few layers that are run here."""
    one, deeper, taller = count(1, 1), count(2, 1), count(1, 2)
    return one + (deeper - one) * (text - 1) + (taller - one) * (vision - 1)


def of_rows(count: Callable[[int], Counts], rows: int) -> Counts:
    """The counts of so many rows. count: of one and of two."""
    one, two = count(1), count(2)
    return one + (two - one) * (rows - 1)
