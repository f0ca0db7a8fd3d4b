"""The order of training rows: batches of rows of similar length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..common.errors import UserError

MEGABATCH = 50  # batches that are sorted by length together


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Indices in a random order in which rows of similar length lie next to each other.

    Rows are shuffled, cut into megabatches of 50 batches, and sorted by length within each: batches have little padding, and their order
    stays random enough. The longest row comes first, so that a lack of memory shows at the first step. The order depends on (seed, epoch)
    alone, so a resumed run continues it. lengths: tokens of each row. batch_size: rows of one step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int):
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0  # set before each epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        key = hashlib.sha256(f"{self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size * max(1, min(MEGABATCH, len(order) // (4 * self.batch_size)))
        groups = [sorted(order[i : i + size], key=lambda n: -self.lengths[n]) for i in range(0, len(order), size)]
        longest = max(range(len(groups)), key=lambda g: self.lengths[groups[g][0]]) if groups else 0
        if longest:
            groups[0][0], groups[longest][0] = groups[longest][0], groups[0][0]
        return iter([n for group in groups for n in group])


def set_sampler(loader: Any, sampler: torch.utils.data.Sampler[Any]) -> None:
    """Let a prepared data loader draw its indices from `sampler`. Raises UserError if it makes batches in another way."""
    holder = loader.batch_sampler
    while hasattr(holder, "batch_sampler"):  # of several processes, each takes its share of one
        holder = holder.batch_sampler
    if not hasattr(holder, "sampler"):
        raise UserError("trainer.train_sampling_strategy: this strategy makes batches in a way that rows cannot be grouped in; use random")
    holder.sampler = sampler
