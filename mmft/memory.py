"""Memory that is at its end: how it is recognised, on a GPU and in the machine, and what is said."""

from __future__ import annotations

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
