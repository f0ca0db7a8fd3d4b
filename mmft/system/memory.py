"""Measure free memory, and detect and report out-of-memory errors."""

from __future__ import annotations

import gc
from collections.abc import Callable

# Messages of torch's CPU allocator, the C++ library and oneDNN; only CUDA has an exception of its own.
MESSAGES = (
    "defaultcpuallocator: can't allocate memory", "defaultcpuallocator: not enough memory", "std::bad_alloc", "could not create a memory",
    "out of memory", "cannot allocate memory",
)  # fmt: skip
ADVICE = (
    "trainer.gradient_checkpointing=true, a smaller trainer.per_device_train_batch_size (and a larger trainer.gradient_accumulation_steps),"
    " model.processor.max_pixels, or model.quantization={load_in_4bit: true}"
)
USABLE = 0.6  # share of the free memory that forward passes may take; the rest is for temporary tensors


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory could not be allocated, on a GPU or in the machine."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and any(words in str(error).lower() for words in MESSAGES)


def release_memory() -> None:
    """Collect garbage and return cached GPU memory to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_memory(device: str, sharers: int = 1) -> int:
    """Bytes that can still be allocated on a device. sharers: processes that divide the machine's memory among them."""
    import psutil
    import torch

    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available // sharers


def passes_that_fit(forward: Callable[[], object], device: str, wanted: int, sharers: int = 1) -> int:
    """How many times the rows of one forward pass fit into memory at once: at least 1, at most `wanted`.

    Counts the bytes that autograd keeps for the backward pass of `forward()`, without weights.
    """
    import torch

    if wanted == 1:
        return 1
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.device.type == torch.device(device).type:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    # the largest gradient of an activation exists beside them
    per_pass = sum(kept.values()) + max(kept.values(), default=0) + 1
    return max(1, min(wanted, int(USABLE * free_memory(device, sharers) / per_pass)))
