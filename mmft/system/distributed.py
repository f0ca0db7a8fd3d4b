"""One model trained by several processes (torchrun, accelerate launch): which of them writes, and what all must agree on."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def rank() -> int:
    """This process's number among those that train one model, 0 for a single one; as the launchers say it, without torch."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process's number on its machine, by which it takes its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def share(make: Callable[[], T]) -> T:
    """What the main process's `make()` returns, or raises, in every process; the others do not call it."""
    if world_size() == 1:
        return make()
    import torch.distributed as dist
    from accelerate import PartialState

    if not dist.is_initialized():
        PartialState()  # joins the others as the launcher's variables say, and takes this process's GPU
    answer: list[Any] = [None, None]
    if is_main():
        try:
            answer[0] = make()
        except Exception as error:  # raised in all of them: one that went on would wait for the others for ever
            answer[1] = error
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def total(value: Any) -> Any:
    """The sum of a 0-d tensor (or a number) over all processes."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    whole = torch.as_tensor(value, device=PartialState().device).clone()
    dist.all_reduce(whole)
    return whole
