"""Memory that is at its end: how it is recognised, on a GPU and in the machine, and what is said."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# What torch's CPU allocator, the C++ library and oneDNN say; only CUDA's has an exception of its own.
SAID = ("defaultcpuallocator: can't allocate memory", "defaultcpuallocator: not enough memory", "std::bad_alloc", "could not create a memory", "out of memory", "cannot allocate memory")
SMALLER = (
    "trainer.gradient_checkpointing=true, a smaller trainer.per_device_train_batch_size (and a larger trainer.gradient_accumulation_steps),"
    " model.processor.max_pixels, or model.quantization={load_in_4bit: true}"
)


def is_out(error: BaseException | None) -> bool:
    """Whether an error says that there was no memory for what was asked."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in SAID)


def freed() -> None:
    """Give back what nobody holds any more, for what comes next."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


ROOM = 0.6  # of the free memory that passes may take; the rest is for what is made on the way


sharers = 1  # processes that compute side by side, each with its part of the memory that is free (joint/processes.py)


def free_memory(device: str) -> int:
    """Bytes that may still be taken on the device a model is on."""
    import psutil
    import torch

    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // sharers


def fitting(one: Callable[[], Any], device: str, wanted: int) -> int:
    """How many times the rows of `one()`, a forward pass, fit into one pass, by the bytes it keeps for its gradients.

    Counted as autograd keeps them, weights left out; at least 1, at most `wanted`.
    """
    import torch

    if wanted == 1:
        return 1
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.device.type == torch.device(device).type:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = one()
    del answer
    # the largest gradient of an activation lives beside them
    return max(1, min(wanted, int(ROOM * free_memory(device) / (sum(kept.values()) + max(kept.values(), default=0) + 1))))
