"""One pass in place of several: how many fit into memory, and the micro-batches of a step as one batch."""

from __future__ import annotations

import math
from typing import Any

from ..common.errors import RowError, UserError
from ..system.memory import fitting

WIDER = 1.1  # positions of folded batches by those of the batches apart, above which a CPU gains nothing
FEWEST, MOST = 16, 64  # rows that are looked at for it


def foldable(trainer: dict[str, Any]) -> int:
    """How many micro-batches of a step could be one by the settings alone (1: none). Errors raised: UserError."""
    from ..system.distributed import world_size

    wanted = trainer.get("fold_accumulation") or "auto"
    if wanted not in ("auto", "always", "off"):
        raise UserError(f"trainer.fold_accumulation={wanted}: must be auto, always or off")
    if wanted == "off" or world_size() > 1 or trainer.get("deepspeed") or trainer.get("fsdp"):
        return 1
    return trainer.get("gradient_accumulation_steps") or 1


def folded(trainer: dict[str, Any], model: Any, collator: Any, rows: Any, together: bool = False) -> int:
    """The number of micro-batches that become one batch: all of a step's, or 1.

    Sum over supervised tokens / their number in the step is the same either way, and so is its gradient; dropout is drawn
    for each micro-batch as it would be alone (mmft/adapters/seeded_dropout.py). A CPU computes all padding at its full price, so there
    `auto` folds rows of about one length: on two cores it was measured to take 0.9 of the time and 1.06 of the memory.
    together: points are trained in step, whose passes are large enough already: folded they took as long and 1.3 of the memory.
    """
    from ..common.tensors import to_device
    from ..losses.supervised import supervised_loss

    accumulate = foldable(trainer)
    if accumulate == 1:
        return 1
    size = trainer["per_device_train_batch_size"]
    if model.device.type == "cpu" and trainer.get("fold_accumulation") != "always" and (together or widened(collator, rows, size, accumulate) > WIDER):
        return 1
    batch = to_device(collator([rows[i] for i in range(min(size, len(rows)))]), model.device)
    batch.pop("row_ids", None)
    model.train()
    fits = fitting(lambda: supervised_loss(model, batch), model.device.type, accumulate)
    return accumulate if fits == accumulate else 1


def widened(collator: Any, rows: Any, size: int, accumulate: int) -> float:
    """Positions, padding and all, of batches of `size` x `accumulate` rows by those of batches of `size`, in some rows from all over the set."""
    n = min(len(rows), max(FEWEST, min(MOST, size * accumulate)))
    try:
        lengths = collator([rows[i * len(rows) // n] for i in range(n)])["attention_mask"].sum(dim=1)
    except RowError:  # training says so where it meets the row
        return math.inf
    apart, folded = (sum(len(part) * int(part.max()) for part in lengths.split(batch)) for batch in (size, size * accumulate))
    return folded / apart


def micro_batches(attention_mask: Any, size: int) -> list[tuple[int, int]]:
    """(rows, longest row) of each micro-batch of `size` rows in a batch padded on the right."""
    lengths = attention_mask.sum(dim=1)
    return [(len(part), int(part.max())) for part in lengths.split(size)]
