"""One pass in place of several: how many fit into memory, and the micro-batches of a step as one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import UserError

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


def foldable(trainer: dict[str, Any], device: str) -> int:
    """How many micro-batches of a step could be one by the settings alone (1: none). Errors raised: UserError.

    auto folds on GPUs, which small batches leave idle; on a CPU of two cores it was measured to take 0.89 of the time and 1.07 of the memory.
    """
    from .distributed import world_size

    wanted = trainer.get("fold_accumulation") or "auto"
    if wanted not in ("auto", "always", "off"):
        raise UserError(f"trainer.fold_accumulation={wanted}: must be auto, always or off")
    if wanted == "off" or wanted == "auto" and device == "cpu" or world_size() > 1 or trainer.get("deepspeed") or trainer.get("fsdp"):
        return 1
    return trainer.get("gradient_accumulation_steps") or 1


def folded(trainer: dict[str, Any], model: Any, collator: Any, rows: Any) -> int:
    """The number of micro-batches that become one batch: all of a step's, or 1.

    Sum over supervised tokens / their number in the step is the same either way, and so is its gradient; dropout is drawn
    for each micro-batch as it would be alone (mmft/dropout.py).
    """
    from .evaluation import to_device
    from .objective import supervised_loss

    accumulate = foldable(trainer, model.device.type)
    if accumulate == 1:
        return 1
    size = trainer["per_device_train_batch_size"]
    batch = to_device(collator([rows[i] for i in range(min(size, len(rows)))]), model.device)
    batch.pop("row_ids", None)
    model.train()
    fits = fitting(lambda: supervised_loss(model, batch), model.device.type, accumulate)
    return accumulate if fits == accumulate else 1


def micro_batches(attention_mask: Any, size: int) -> list[tuple[int, int]]:
    """(rows, longest row) of each micro-batch of `size` rows in a batch padded on the right."""
    lengths = attention_mask.sum(dim=1)
    return [(len(part), int(part.max())) for part in lengths.split(size)]
