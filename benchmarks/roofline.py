"""Predict a step's time on a GPU from counted operations: arithmetic, memory traffic, and kernels that must be launched.

Operations are counted while a step runs here without numbers (`shapes.py`), at the model's true size. What is not counted: kernels that a GPU fuses or
splits, and the time of the host's Python between two steps.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .shapes import tensors_in


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
FREE = ("aten::detach", "aten::lift_fresh", "aten::_local_scalar_dense", "aten::empty", "aten::empty_like", "aten::empty_strided")  # move no bytes
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

    def busy(self, machine: Machine) -> float:
        """Seconds that the GPU computes: products take as long as their arithmetic or their traffic, everything else as long as its traffic."""
        return max(self.flops / (machine.flops * machine.share), self.weights / machine.bandwidth) + self.values / machine.bandwidth

    def seconds(self, machine: Machine) -> float:
        """The host launches kernels while the GPU computes, so the slower of the two decides."""
        return max(self.busy(machine), self.kernels * machine.launch)


class Counting(TorchDispatchMode):
    """Counts what runs inside `with`.

    held: bytes of the storages that were made inside and are alive. peak: the most that were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts, self.held, self.peak = Counts(), 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.is_view or func.namespace == "prim":  # prim asks for a property
            return result
        name = func._schema.name
        made, given = tensors_in(result), tensors_in((args, kwargs))
        before = {t.untyped_storage()._cdata for t in given}
        for tensor in made:
            if tensor.untyped_storage()._cdata not in before:
                self._hold(tensor.untyped_storage())
        if name in FREE:
            return result
        size = sum(t.numel() * t.element_size() for t in (made * 2 if name in LOOKUPS else (*made, *given)))
        formula = formula_of(func)
        self.counts += Counts(formula(*args, **kwargs, out_val=result), size, 0, 1) if formula else Counts(0, 0, size, 1)
        return result

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


@functools.cache
def formula_of(func: Any) -> Callable[..., float] | None:
    """torch's formula for the operations of a product, also for products that are added in place, and for attention on a CPU."""
    aten = torch.ops.aten
    packet = func._overloadpacket
    alike = {
        aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm, aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: aten._scaled_dot_product_flash_attention_backward,
    }  # fmt: skip
    return flop_registry.get(alike.get(packet, packet))


def counted(work: Callable[[], object]) -> Counts:
    with Counting() as counting:
        work()
    return counting.counts
