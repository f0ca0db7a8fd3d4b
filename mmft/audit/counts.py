"""Count the tokens of many rows: length, image tokens, tokens with loss; and collect the rows that the collator refuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any

from ..collators.base import IGNORE
from ..collators.types import Batch, BatchMaker
from ..common.errors import UserError
from ..system.console import shows_progress

if TYPE_CHECKING:
    from ..data.sample import Sample

PERCENTILES = (0, 50, 90, 99, 100)
Collate = Callable[[Sequence[Any]], Batch]  # makes a batch of rows


@dataclass
class TokenCounts:
    """lengths, images, supervised: one number per sequence; a row is one sequence, or several where its answers need different contexts.

    weights: loss weight -> number of supervised tokens; empty where all weigh 1. counted: rows that were collated. refused: (row id, reason). rows: in the whole split.
    """

    lengths: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)
    supervised: list[int] = field(default_factory=list)
    weights: dict[float, int] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    counted: int = 0
    rows: int = 0

    def table(self) -> list[tuple[str, list[int], int]]:
        """(what is counted, its percentiles PERCENTILES, sum)."""
        named = {"tokens": self.lengths, "image tokens": self.images, "tokens with loss": self.supervised}
        return [(name, [percentile(v, share) for share in PERCENTILES], sum(v)) for name, v in named.items()]

    def weights_note(self) -> str:
        """The loss weights with their tokens and their shares of the loss's weight; "" where all tokens weigh 1."""
        total = sum(weight * n for weight, n in self.weights.items())
        return ", ".join(f"{weight:g}: {n:,} tokens ({weight * n / total:.1%} of the loss's weight)" for weight, n in self.weights.items())

    @property
    def per_row(self) -> float:
        """Sequences of a row on average."""
        return len(self.lengths) / max(self.counted, 1)

    def padded(self, batch: int, draws: int = 200) -> int:
        """Tokens of an average batch of `batch` random sequences, each padded to the longest of them."""
        rng = Random(0)
        return round(sum(batch * max(rng.choices(self.lengths, k=batch)) for _ in range(draws)) / draws)


def percentile(values: Sequence[int], share: int) -> int:
    """The smallest value that at least `share` percent of all values do not exceed (nearest rank); 0 without values."""
    ordered = sorted(values)
    return ordered[max(-(-len(ordered) * share // 100), 1) - 1] if ordered else 0


def count_tokens(collator: BatchMaker, rows: Sequence[Sample], limit: int | None, collate: Collate | None = None) -> TokenCounts:
    """Collate rows one by one, `limit` of them, evenly spread (None: all). A refused row is recorded, not raised. collate: makes the batches of
    training, where the collator itself does not.
    """
    from tqdm import tqdm

    n = len(rows) if limit is None else min(limit, len(rows))
    counts = TokenCounts(rows=len(rows))
    weighed, plain = Counter[float](), 0
    for i in tqdm(range(n), desc="rows", leave=False, disable=not shows_progress()):
        row = rows[i * len(rows) // n]
        try:
            batch = (collate or collator)([row])
        except UserError as error:  # a RowError or an ImageError
            counts.refused.append((row.id, getattr(error, "reason", str(error))))
            continue
        counts.counted += 1
        given = batch.get("loss_weights")
        for weight, label in zip(given[:, 1:].flatten().tolist(), batch["labels"][:, 1:].flatten().tolist()) if given is not None else ():
            if label != IGNORE:
                weighed[round(weight, 6)] += 1
        plain += int((batch["labels"][:, 1:] != IGNORE).sum()) if given is None else 0
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"]):
            counts.lengths.append(int(mask.sum()))
            counts.images.append(int((ids == collator.image_token_id).sum()))
            counts.supervised.append(int((labels != IGNORE).sum()))
    if weighed:
        weighed[1.0] += plain
        counts.weights = {weight: n for weight, n in sorted(weighed.items()) if n}
    return counts
