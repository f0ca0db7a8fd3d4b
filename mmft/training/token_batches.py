"""Batches that are filled by tokens: `trainer.tokens_per_batch` decides how many rows a micro-batch has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..collators.types import Batch, BatchMaker
from ..common.errors import UserError
from ..config.settings import Section
from ..data.augment import Augmented
from ..data.mixing import Mixing
from .sampling import MEGABATCH, epoch_order, shuffled

PLANNED = 8  # epochs whose batches are counted beforehand
STRATEGIES = (None, "random", "group_by_length")  # of trainer.train_sampling_strategy, beside tokens_per_batch


@dataclass(frozen=True)
class RowSizes:
    """lengths: tokens of each training row, of its longest sequence. sequences: into how many sequences each row is cut."""

    lengths: Sequence[int]
    sequences: Sequence[int]

    def tokens(self, row: int) -> int:
        """The positions that a row needs at least, in a batch of its own."""
        return self.lengths[row] * self.sequences[row]

    @property
    def mean(self) -> float:
        """Tokens of a row on average."""
        return sum(map(self.tokens, range(len(self.lengths)))) / max(len(self.lengths), 1)


def check_longest(trainer: Section, rows: Sequence[Any], sizes: RowSizes) -> None:
    """Raises UserError, naming the row, if `trainer.tokens_per_batch` does not hold the longest training row."""
    limit = trainer.get("tokens_per_batch")
    if limit is None:
        return
    longest = max(range(len(rows)), key=sizes.tokens)
    if (tokens := sizes.tokens(longest)) > limit:
        parts = f", in {sizes.sequences[longest]} sequences" if sizes.sequences[longest] > 1 else ""
        raise UserError(
            f"trainer.tokens_per_batch={limit}: row {rows[longest].id} has {tokens} tokens{parts}; set it to {tokens} or more,"
            f" or leave out long rows with collator.max_length={limit} data.too_long=drop"
        )


class TokenBatchSampler(torch.utils.data.Sampler[tuple[int, ...]]):
    """The batches of an epoch as tuples of row indices: each has at most `tokens` positions, padding included.

    Rows are shuffled, cut into megabatches of about 50 batches, sorted by length within each, and batches are filled in that order; then the batches are
    shuffled. The one that needs most memory comes first. `packed` rows need no padding, so batches are filled in the random order.
    Everything depends on (seed, epoch) alone, so a resumed run continues it.

    Rows fill another number of batches in each epoch, and the Trainer counts on one number, which must not change when a run is extended. It is
    the largest of the first PLANNED epochs; in an epoch that would need fewer, the batches of most rows are halved, and a later epoch
    that would need more takes the batches of one of the first in a new order. The number fills whole steps of `accumulate` batches in
    each of `processes`, unless all batches are fewer than a step has.
    """

    def __init__(
        self, sizes: RowSizes, tokens: int, seed: int, mixing: Mixing | None = None, packed: bool = False, processes: int = 1, accumulate: int = 1
    ):
        self.sizes, self.limit, self.seed, self.mixing, self.packed, self.processes = sizes, tokens, seed, mixing, packed, processes
        self.rows_per_epoch = len(sizes.lengths) if mixing is None else mixing.draws
        self.batches_per_step = processes * accumulate
        self.epoch = 0  # set before each epoch
        self._count = max(self._whole(len(self._filled(epoch))) for epoch in range(PLANNED))
        self._made: tuple[int, list[tuple[int, ...]]] | None = None  # the latest epoch

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self._count / self.batches_per_step)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, ...]]:
        return iter(self.batches(self.epoch))

    def batches(self, epoch: int) -> list[tuple[int, ...]]:
        """The batches of an epoch, in their order."""
        if self._made is None or self._made[0] != epoch:
            filled = self._filled(epoch)
            batches = self._halved(filled if len(filled) <= self._count else self._filled(epoch % PLANNED))
            batches = [batches[i] for i in shuffled(len(batches), self.seed, "batches", epoch)]
            largest = max(range(len(batches)), key=lambda n: self._need(batches[n]))
            batches[0], batches[largest] = batches[largest], batches[0]
            self._made = epoch, [tuple(batch) for batch in batches]
        return self._made[1]

    def rows_until(self, step: int) -> int:
        """The rows of the first `step` steps of a training."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        return epochs * self.rows_per_epoch + (sum(map(len, self.batches(epochs)[: rest * self.batches_per_step])) if rest else 0)

    def _whole(self, count: int) -> int:
        """The next number of batches that fills whole steps; no more than there are rows."""
        whole = self.batches_per_step if count > self.batches_per_step else self.processes
        return min(-(-count // whole) * whole, max(self.rows_per_epoch, 1))

    def _filled(self, epoch: int) -> list[list[int]]:
        order = epoch_order(len(self.sizes.lengths), self.mixing, self.seed, epoch)
        if self.packed:
            return self._fill(order)
        size = math.ceil(self.limit / max(self.sizes.mean, 1))  # rows of a batch, about
        size *= max(1, min(MEGABATCH, len(order) // (2 * size)))
        groups = (sorted(order[i : i + size], key=lambda n: -self.sizes.lengths[n]) for i in range(0, len(order), size))
        return [batch for group in groups for batch in self._fill(group)]

    def _fill(self, order: list[int]) -> list[list[int]]:
        """Batches of the rows in this order; a row that would not fit begins the next one."""
        batches: list[list[int]] = []
        sequences = longest = total = 0
        for row in order:
            n, length = self.sizes.sequences[row], self.sizes.lengths[row]
            need = total + n * length if self.packed else (sequences + n) * max(longest, length)
            if not batches or need > self.limit:
                batches.append([])
                sequences = longest = total = 0
            batches[-1].append(row)
            sequences, longest, total = sequences + n, max(longest, length), total + n * length
        return batches

    def _halved(self, batches: list[list[int]]) -> list[list[int]]:
        while len(batches) < self._count:
            largest = max(range(len(batches)), key=lambda n: len(batches[n]))
            rows = batches[largest]
            batches[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
        return batches

    def _need(self, batch: Sequence[int]) -> tuple[int, int]:
        """(the longest row, the positions) of a batch: attention grows with the square of the first."""
        longest = max(self.sizes.lengths[row] for row in batch)
        total = sum(map(self.sizes.tokens, batch))
        return (total, longest) if self.packed else (longest, longest * sum(self.sizes.sequences[row] for row in batch))


@dataclass
class BatchedRows(Sequence[Any]):
    """Training rows that are asked for in batches: by a tuple of indices, or (epoch, such a tuple) of augmented rows."""

    rows: Sequence[Any]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        if isinstance(self.rows, Augmented):
            epoch, indices = key
            return [self.rows[epoch, index] for index in indices]
        return [self.rows[index] for index in key]


@dataclass
class BatchOfRows:
    """A data loader's collate function: it gets batches that `BatchedRows` returned, and collates all of their rows."""

    collator: BatchMaker

    def __call__(self, batches: Sequence[Sequence[Any]]) -> Batch:
        return self.collator([row for batch in batches for row in batch])
