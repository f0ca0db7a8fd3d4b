"""Mixing: how often the rows of each source are drawn in an epoch of a mix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Mixing:
    """sizes: training rows of each source, in the order in which the rows lie. counts: draws of each source in an epoch.

    every_row_once: the sources are one data set, each row comes once in an epoch, and nothing is drawn.
    """

    sizes: Mapping[str, int]
    counts: Mapping[str, int]
    every_row_once: bool = False

    @property
    def draws(self) -> int:
        """Rows of an epoch."""
        return sum(self.counts.values())

    def rows_seen(self, drawn: int) -> int:
        """How many different rows `drawn` draws reach: no row comes again before all rows of its source came."""
        epochs = Fraction(drawn, max(self.draws, 1))
        return sum(min(size, int(epochs * self.counts[name])) for name, size in self.sizes.items())

    def describe(self) -> list[str]:
        """`captions 700 of 1000 rows an epoch`, a line for each source."""
        if self.every_row_once:
            return [f"{name}: all {size} training rows an epoch" for name, size in self.sizes.items()]
        share = {name: f"{count / self.draws:.1%}" for name, count in self.counts.items()}
        return [f"{name}: {self.counts[name]} draws an epoch from {size} training rows ({share[name]})" for name, size in self.sizes.items()]


def mixing(sizes: Mapping[str, int], weights: Mapping[str, float | None], draws: int | None) -> Mixing:
    """The draws of each source. weights: relative to each other, 1 where one is missing; if all are, in proportion to the rows.

    draws: of an epoch (None: as many as there are rows). Without draws and weights every row comes once.
    """
    given = {name: weights[name] for name in sizes}
    if all(weight is None for weight in given.values()):
        if draws is None:
            return Mixing(sizes, dict(sizes), every_row_once=True)
        given = {name: float(size) for name, size in sizes.items()}
    shares = {name: Fraction(1 if weight is None else weight) for name, weight in given.items()}
    return Mixing(sizes, apportioned(draws or sum(sizes.values()), shares))


def apportioned(total: int, weights: Mapping[str, Fraction]) -> dict[str, int]:
    """`total` divided by weight into whole numbers that add up to it: the largest remainders get what rounding down leaves."""
    whole = sum(weights.values())
    quotas = {name: total * weight / whole for name, weight in weights.items()}
    counts = {name: int(quota) for name, quota in quotas.items()}
    by_remainder = sorted(quotas, key=lambda name: counts[name] - quotas[name])  # a stable sort: the first source wins a tie
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts
