"""The order of training rows: drawn from the sources of a mix, and in batches of rows of similar length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ..common.errors import UserError
from ..data.mixing import Mixing

MEGABATCH = 50  # batches that are sorted by length together


def shuffled(n: int, *key: object) -> list[int]:
    """0 ... n - 1 in a random order that depends on `key` alone."""
    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(n, generator=generator).tolist()


def drawn_rows(mixing: Mixing, seed: int, epoch: int) -> list[int]:
    """The rows of an epoch of a mix, source after source: each source goes on where its last epoch ended in a random order of its rows, and
    begins another order when all of them came. Depends on (seed, epoch) alone.
    """
    rows: list[int] = []
    first = 0
    for name, size in mixing.sizes.items():
        start = epoch * mixing.counts[name]
        end = start + mixing.counts[name]
        for turn in range(start // size, -(-end // size)):
            order = shuffled(size, seed, name, turn)
            rows += [first + i for i in order[max(0, start - turn * size) : end - turn * size]]
        first += size
    return rows


def epoch_order(n_rows: int, mixing: Mixing | None, seed: int, epoch: int) -> list[int]:
    """All rows, or those drawn from a mix, in a random order that depends on (seed, epoch) alone."""
    if mixing is None:
        return shuffled(n_rows, seed, epoch)
    rows = drawn_rows(mixing, seed, epoch)
    return [rows[i] for i in shuffled(len(rows), seed, epoch)]


class MixtureSampler(torch.utils.data.Sampler[int]):
    """The rows that an epoch draws from a mix. A resumed run continues the order, whatever its data workers and processes are."""

    def __init__(self, mixing: Mixing, seed: int):
        self.mixing, self.seed = mixing, seed
        self.epoch = 0  # set before each epoch

    def __len__(self) -> int:
        return self.mixing.draws

    def __iter__(self) -> Iterator[int]:
        return iter(epoch_order(0, self.mixing, self.seed, self.epoch))


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Indices in a random order in which rows of similar length lie next to each other.

    Rows are shuffled, cut into megabatches of 50 batches, and sorted by length within each: batches have little padding, and their order
    stays random enough. The longest row comes first, so that a lack of memory shows at the first step. The order depends on (seed, epoch)
    alone, so a resumed run continues it. lengths: tokens of each row. batch_size: rows of one step. mixing: of a mix whose rows are drawn.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, mixing: Mixing | None = None):
        self.lengths, self.batch_size, self.seed, self.mixing = lengths, batch_size, seed, mixing
        self.epoch = 0  # set before each epoch

    def __len__(self) -> int:
        return len(self.lengths) if self.mixing is None else self.mixing.draws

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(len(self.lengths), self.mixing, self.seed, self.epoch)
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
