"""Tokens of many rows: lengths, image tokens, tokens that carry loss; and the rows the collator refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..collators.base import IGNORE, Collator
from ..common.errors import UserError

SHARES = (0, 50, 90, 99, 100)


@dataclass
class Counts:
    """One number a row that was counted; refused: (row id, reason)."""

    lengths: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    rows: int = 0  # in the whole split

    def table(self) -> list[tuple[str, list[int], int]]:
        """(what, its percentiles SHARES, sum)."""
        named = {"tokens": self.lengths, "image tokens": self.images, "tokens with loss": self.supervised}
        return [(name, [percentile(v, share) for share in SHARES], sum(v)) for name, v in named.items()]

    def padded(self, batch: int, draws: int = 200) -> int:
        """Tokens of an average batch, each row as long as its longest."""
        from random import Random

        rng = Random(0)
        return round(sum(batch * max(rng.choices(self.lengths, k=batch)) for _ in range(draws)) / draws)


def percentile(values: Sequence[int], share: int) -> int:
    """The smallest value that at least `share` percent of all values do not exceed (nearest rank); 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * share // 100), 1) - 1] if ordered else 0


def count(collator: Collator, rows: Sequence[Any], limit: int | None) -> Counts:
    """Collate rows one by one, `limit` of them evenly spread. A row that is refused is named, not raised."""
    import sys

    from tqdm import tqdm

    n = len(rows) if limit is None else min(limit, len(rows))
    found = Counts(rows=len(rows))
    image = collator.image_token_id
    for i in tqdm(range(n), desc="rows", leave=False, disable=not sys.stderr.isatty()):
        row = rows[i * len(rows) // n]
        try:
            batch = collator([row])
        except UserError as error:  # RowError and ImageError alike
            found.refused.append((row.id, getattr(error, "reason", str(error))))
            continue
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        found.lengths.append(len(ids))
        found.images.append(int((ids == image).sum()))
        found.supervised.append(int((labels != IGNORE).sum()))
    return found
