"""Merge the micro-batches of a step into one batch, where memory allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..collators.types import BatchMaker
from ..common.errors import RowError, UserError
from ..common.tensors import to_device
from ..config.settings import Section, sharded_by
from ..losses.packing import Packing
from ..losses.supervised import grouped_loss
from ..system.distributed import world_size
from ..system.memory import passes_that_fit
from .token_batches import STRATEGIES

MAX_PADDING = 1.1  # positions of merged batches / positions of the batches apart; above it a CPU gains nothing
MIN_ROWS, MAX_ROWS = 16, 64  # rows that are looked at to estimate it


def mergeable(trainer: Section) -> int:
    """How many micro-batches of a step could be merged by the settings alone (1: none)."""
    if (trainer.get("fold_accumulation") or "auto") == "off" or why_apart(trainer) is not None:
        return 1
    return trainer.get("gradient_accumulation_steps") or 1


def why_apart(trainer: Section) -> str | None:
    """Why the settings keep the micro-batches of a step apart; None if they do not."""
    if world_size() > 1:
        return "several processes share the micro-batches of a step"
    if key := sharded_by(trainer):
        return f"trainer.{key} takes a model apart"
    if trainer.get("neftune_noise_alpha"):
        return "the noise of trainer.neftune_noise_alpha depends on the padded length of a batch"
    if trainer.get("tokens_per_batch"):
        return "trainer.tokens_per_batch says how large a batch is; raise it and lower trainer.gradient_accumulation_steps instead"
    return None


def check_batches(trainer: Section) -> None:
    """Check the keys that say how batches are made, before anything is read. Raises UserError."""
    mode = trainer.get("fold_accumulation") or "auto"
    if mode not in ("auto", "always", "off"):
        raise UserError(f"trainer.fold_accumulation={mode}: must be auto, always or off")
    accumulate = trainer.get("gradient_accumulation_steps") or 1
    if mode == "always" and accumulate > 1 and (why := why_apart(trainer)) is not None:
        raise UserError(f"trainer.fold_accumulation=always: {why}; with auto or off they are computed one after another")
    tokens, order = trainer.get("tokens_per_batch"), trainer.get("train_sampling_strategy")
    if tokens is not None and tokens < 1:
        raise UserError(f"trainer.tokens_per_batch={tokens}: must be a number of tokens above 0, or null")
    if tokens is not None and order not in STRATEGIES:
        raise UserError(f"trainer.tokens_per_batch={tokens}: fills batches in an order of its own, not in that of trainer.train_sampling_strategy={order}; leave one out")
    if trainer.get("packing") and trainer.get("neftune_noise_alpha"):
        raise UserError("trainer.packing=true: the noise of trainer.neftune_noise_alpha depends on the length of a sequence, which packing changes; leave one out")


def merged_micro_batches(
    trainer: Section, model: Any, collator: BatchMaker, rows: Sequence[Any], joint: bool = False, sharers: int = 1, packing: Packing | None = None, by_row: bool = False
) -> int:
    """The number of micro-batches that become one batch: all of a step's, or 1.

    The loss, a sum over supervised tokens divided by their number in the step, is the same either way, and so is its gradient. Dropout
    is drawn for each micro-batch as it would be alone. A CPU computes padding at its full price, so `auto` merges only rows of about one
    length there: on two cores merged batches took 0.9 of the time and 1.06 of the memory. joint: runs are trained jointly; their passes
    are large enough already, merged ones took as long and 1.3 of the memory. sharers: processes that share the machine's memory. packing: lays the rows of
    a batch end to end, so there is no padding; by_row: attention computes each of them alone, and `auto` merges only then, for otherwise its
    cost would grow with the square of the rows.
    """
    accumulate = mergeable(trainer)
    if accumulate == 1:
        return 1
    size = trainer["per_device_train_batch_size"]
    auto = trainer.get("fold_accumulation") != "always"
    if auto and packing is not None and not by_row:
        return 1
    if auto and model.device.type == "cpu" and (joint or (packing is None and padding_ratio(collator, rows, size, accumulate) > MAX_PADDING)):
        return 1
    batch = to_device(collator([rows[i] for i in range(min(size, len(rows)))]), model.device)
    batch.pop("row_ids", None)
    model.train()
    fits = passes_that_fit(lambda: grouped_loss(model, batch, pack=packing), model.device.type, accumulate, sharers)
    return accumulate if fits == accumulate else 1


def padding_ratio(collator: BatchMaker, rows: Sequence[Any], size: int, accumulate: int) -> float:
    """Positions, with padding, of batches of `size` x `accumulate` rows / those of batches of `size` rows, over rows from the whole set."""
    n = min(len(rows), max(MIN_ROWS, min(MAX_ROWS, size * accumulate)))
    try:
        lengths = collator([rows[i * len(rows) // n] for i in range(n)])["attention_mask"].sum(dim=1)
    except RowError:  # training reports the row when it meets it
        return math.inf
    apart, merged = (sum(len(part) * int(part.max()) for part in lengths.split(batch)) for batch in (size, size * accumulate))
    return merged / apart


def micro_batches(attention_mask: torch.Tensor, size: int) -> list[tuple[int, int]]:
    """(rows, longest row) of each micro-batch of `size` rows in a batch that is padded on the right."""
    lengths = attention_mask.sum(dim=1)
    return [(len(part), int(part.max())) for part in lengths.split(size)]


def packed_positions(attention_mask: torch.Tensor, parts: Sequence[tuple[int, int]]) -> torch.Tensor:
    """(T,) the places of the T tokens of a batch (B, S) in its micro-batches, each padded to its own longest row, laid end to end."""
    places, first, start = [], 0, 0
    for rows, longest in parts:
        places.append(attention_mask[first : first + rows, :longest].flatten().nonzero().squeeze(1) + start)
        first, start = first + rows, start + rows * longest
    return torch.cat(places)
