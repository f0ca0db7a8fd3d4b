"""How many bytes tensors hold at most, where the device keeps no such count: every new storage is watched until it dies."""

from __future__ import annotations

import weakref
from typing import Any


class Watched:
    """now, highest: bytes of the storages made since the watch began."""

    def __init__(self) -> None:
        self.now = 0
        self.highest = 0.0
        self._alive: set[int] = set()

    def see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.highest = max(self.highest, float(self.now))
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def held() -> Any:
    """`with held() as watched`: results of operations count, what existed before does not (results that are views of it neither)."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    watched = Watched()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = {t.untyped_storage()._cdata for t in _tensors(tree_leaves((args, kwargs)))}
            out = function(*args, **(kwargs or {}))
            for tensor in _tensors(tree_leaves(out)):
                storage = tensor.untyped_storage()
                if storage._cdata not in before:
                    watched.see(storage)
            return out

        def __enter__(self) -> Watched:
            super().__enter__()
            return watched

    return Watch()


def _tensors(leaves: list[Any]) -> list[Any]:
    import torch

    return [t for t in leaves if isinstance(t, torch.Tensor) and t.layout is torch.strided]
