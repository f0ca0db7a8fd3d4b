"""Track peak tensor memory on devices without an allocator counter."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class AllocationTracker:
    """Counts the bytes of storages while they are alive. current, peak: in bytes."""

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self._alive: set[int] = set()  # addresses

    def add(self, storage: torch.UntypedStorage) -> None:
        """Count a storage until it is freed; a storage that is counted already is ignored."""
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._alive or size == 0:
            return
        self._alive.add(address)
        self.current += size
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._alive.discard(address)
        self.current -= size


@contextmanager
def track_allocations() -> Iterator[AllocationTracker]:
    """`with track_allocations() as tracker`: results of operations are counted, tensors made before are not, nor views of them."""
    from torch.utils._python_dispatch import TorchDispatchMode  # where torch's own documentation imports it from

    tracker = AllocationTracker()

    class Track(TorchDispatchMode):
        def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
            inputs = {storage.data_ptr() for storage in _storages((args, kwargs))}
            result = function(*args, **(kwargs or {}))
            for storage in _storages(result):
                if storage.data_ptr() not in inputs:
                    tracker.add(storage)
            return result

    with Track():
        yield tracker


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """The storages of the dense tensors in nested arguments or results."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.layout is torch.strided:
            yield value.untyped_storage()
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _storages(item)
