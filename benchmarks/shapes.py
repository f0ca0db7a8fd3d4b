"""Run a training step without its numbers: floats have only shapes, whole numbers and masks are real.

A model of any size is then built and trained in seconds and without memory, so that what it would compute can be counted. Token ids, grids, positions and masks
have their numbers, because models branch on them: how long a picture is, which rows are masked, where image tokens stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

EQUAL = ("aten::eq", "aten::ge", "aten::le", "aten::isfinite", "aten::isclose")  # said to hold of numbers that do not exist; other comparisons do not


class ShapesOnly(TorchDispatchMode):
    """Inside `with`: tensors of floats that are made have no numbers, nor has anything that is computed from them.

    An index or a comparison computed from such a tensor is needed with numbers: an index is 0 then, a float that is read is 1.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # asked for at every turn
            return args[0].fake_device
        kwargs = kwargs or {}
        name = func._schema.name
        tensors = tensors_in((args, kwargs))
        if not tensors:
            made = self._without_numbers(func, args, kwargs)
            return made if is_float(made) else func(*args, **kwargs)
        if not any(isinstance(t, FakeTensor) for t in tensors):
            return func(*args, **kwargs)
        if name == "aten::_local_scalar_dense":
            return 1.0
        if name == "aten::equal":
            return True
        if not func._schema.returns:  # it changes numbers only
            return None
        if func._schema.is_mutable and not isinstance(args[0], FakeTensor) and isinstance(args[0], torch.Tensor):
            return args[0]
        if name.startswith("aten::index"):
            args = (args[0], tree_map(positions, args[1]), *args[2:]) if isinstance(args[1], (list, tuple)) else args
            args = (args[0], flat(args[1]), *args[2:])
        result = self._without_numbers(func, args, kwargs)
        if isinstance(result, torch.Tensor):
            return result if is_float(result) else numbers(result, name)
        return tree_map(lambda value: value if is_float(value) or not isinstance(value, FakeTensor) else numbers(value, name), result)

    def _without_numbers(self, func: Any, args: Any, kwargs: Any) -> Any:
        with self.fake:
            result = func(*args, **kwargs)
        # its weak references to what was made would forbid `Module.to` to exchange a parameter
        self.fake.fake_tensor_converter.tensor_memo.clear()
        return result


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors in nested arguments or results."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in tensors_in(item)] if isinstance(value, (list, tuple, type({}.values()))) else []


def is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def numbers(value: torch.Tensor, name: str) -> torch.Tensor:
    """What stands for whole numbers or a mask (of the same shape) that follow from floats without numbers."""
    return torch.full(value.shape, value.dtype is torch.bool and name in EQUAL, dtype=value.dtype)


def positions(index: Any) -> Any:
    """A mask as the positions where it is true: how many these are decides the shape of what is selected."""
    return list(index.nonzero().unbind(1)) if isinstance(index, torch.Tensor) and index.dtype is torch.bool and not isinstance(index, FakeTensor) else index


def flat(indices: Any) -> Any:
    return [i for index in indices for i in (index if isinstance(index, list) else [index])] if isinstance(indices, list) else indices
