"""Several processes that train one model (torchrun, accelerate launch): ranks, and values that all processes share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


def rank() -> int:
    """The rank of this process, 0 for a single one; read from the launcher's variables, without torch."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size() -> int:
    """The number of processes that train one model."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """The rank of this process on its machine, which selects its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and log lines."""
    return rank() == 0


def share(compute: Callable[[], T]) -> T:
    """The result, or the exception, of `compute()` in the main process, in every process; the others do not call it."""
    if world_size() == 1:
        return compute()
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState()  # joins the other processes and selects this process's GPU
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = compute()
        except Exception as error:  # raised in every process: one that went on would wait for the others forever
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def total(value: torch.Tensor | float) -> torch.Tensor | float:
    """The sum of a tensor (or a number) over all processes."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    whole = torch.as_tensor(value, device=PartialState().device).clone()
    dist.all_reduce(whole)
    return whole
