"""scan: find the rows that cannot be trained before training starts, from image headers and texts, without decoding an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..common.errors import UserError
from ..system.console import shows_progress
from .answers import AnswerCollator
from .base import NO_LOSS, Collator, size_keys

if TYPE_CHECKING:
    from ..data.sample import Sample

LISTED = 50  # rows named in a message


@dataclass(frozen=True)
class Problem:
    """A row that cannot be trained. tokens: its length, 0 if it could not be encoded."""

    index: int
    row: str
    tokens: int
    reason: str


@dataclass
class Scan:
    """What `scan` found about every row, in order.

    tokens: length of each row (of its longest sequence), 0 for a refused one. loss_tokens: how many carry loss. sequences: how many each
    row becomes. several: rows that become several. ignored_sizes: rows whose size keys the model's family has no use for.
    """

    max_length: int | None
    tokens: list[int] = field(default_factory=list)
    loss_tokens: list[int] = field(default_factory=list)
    sequences: list[int] = field(default_factory=list)
    too_long: list[Problem] = field(default_factory=list)
    refused: list[Problem] = field(default_factory=list)
    without_loss: list[Problem] = field(default_factory=list)
    several: int = 0
    ignored_sizes: int = 0

    @property
    def unusable(self) -> list[Problem]:
        """All rows that cannot be trained, in their order."""
        return sorted([*self.too_long, *self.refused, *self.without_loss], key=lambda problem: problem.index)

    def message(self) -> str:
        """One line about the unusable rows, each named; empty if there are none."""
        parts = []
        if self.too_long:
            parts.append(f"{len(self.too_long)} of {len(self.tokens)} rows are longer than collator.max_length={self.max_length}: "
                         + _listed([f"{p.row} ({p.tokens} tokens)" for p in self.too_long]))  # fmt: skip
        if self.without_loss:
            parts.append(f"{len(self.without_loss)} rows have no token with loss: " + _listed([p.row for p in self.without_loss]))
        if self.refused:
            parts.append(f"{len(self.refused)} rows cannot be encoded: " + _listed([f"{p.row} ({p.reason})" for p in self.refused]))
        return "; ".join(parts)


def scan(collator: Collator | AnswerCollator, rows: Sequence[Sample], progress: bool = False) -> Scan:
    """Measure every row with `Collator.measure`. Rows that it refuses are collected, not raised."""
    from tqdm import tqdm

    result = Scan(collator.max_length)
    no_sizes = collator.family.image_size(64, 64, {}, collator.processor.image_processor) is None
    for i in tqdm(range(len(rows)), desc="rows", leave=False, disable=not (progress and shows_progress())):
        row = rows[i]
        result.ignored_sizes += no_sizes and any(size_keys(row))
        try:
            size = collator.measure(row)
        except UserError as error:  # RowError and ImageError alike
            result.refused.append(Problem(i, row.id, 0, getattr(error, "reason", str(error))))
            result.tokens.append(0)
            result.loss_tokens.append(0)
            result.sequences.append(0)
            continue
        result.tokens.append(size.tokens)
        result.loss_tokens.append(size.loss_tokens)
        result.sequences.append(size.sequences)
        result.several += size.sequences > 1
        if collator.max_length is not None and size.tokens > collator.max_length:
            result.too_long.append(Problem(i, row.id, size.tokens, f"{size.tokens} tokens"))
        elif not size.loss_tokens:
            result.without_loss.append(Problem(i, row.id, size.tokens, NO_LOSS))
    return result


def _listed(rows: list[str]) -> str:
    more = f", and {len(rows) - LISTED} more" if len(rows) > LISTED else ""
    return ", ".join(rows[:LISTED]) + more
