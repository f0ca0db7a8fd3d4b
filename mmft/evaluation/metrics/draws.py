"""Draws: bootstrap resamples of rows, and the corpus scores of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...common.records import MetricValues

RESAMPLES = 1000
RECOMPUTED = 200  # resamples of a score that has no faster way than to be computed from the rows again
SECONDS = 3.0  # of the processor that recomputing may take; a slower score gets no interval
CELLS = 1 << 22  # numbers of a product that are in memory at once

Resampled = dict[str, np.ndarray]  # score -> (resamples,) its values


@dataclass(frozen=True)
class Draws:
    """counts: (resamples, rows), how often each resample has each row. The first resample is the rows themselves, each once."""

    counts: np.ndarray

    @classmethod
    def of(cls, rows: int, resamples: int = RESAMPLES, seed: int = 0) -> Draws:
        """`resamples` draws of `rows` rows with replacement, behind the rows themselves; the same for the same numbers."""
        random = np.random.default_rng(seed)
        counts = np.ones((resamples + 1, rows), dtype=np.uint16)
        for i in range(1, resamples + 1):
            counts[i] = np.bincount(random.integers(rows, size=rows), minlength=rows)
        return cls(counts)

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(resamples, k): the sums over rows of (rows, k) numbers."""
        step = max(1, CELLS // max(1, self.counts.shape[1]))
        return np.concatenate([self.counts[i : i + step].astype(np.float64) @ values for i in range(0, len(self.counts), step)])

    def means(self, names: Sequence[str], values: Sequence[MetricValues]) -> Resampled:
        """The mean of each score over the rows that have it; NaN for a resample without such a row, no entry for a score of no row."""
        result: Resampled = {}
        for name in names:
            has = np.array([[name in v] for v in values], dtype=np.float64)
            if has.any():
                sums = self.sums(np.hstack([has, [[v.get(name, 0.0)] for v in values]]))
                result[name] = ratio(sums[:, 1], sums[:, 0], np.nan)
        return result

    def recomputed(self, corpus: Callable[[list[int]], MetricValues]) -> Resampled:
        """`corpus` of the row numbers of up to RECOMPUTED resamples; {} if that would take longer than SECONDS."""
        counts = self.counts[: RECOMPUTED + 1]
        for _ in range(2):  # the first time may include imports
            began = time.process_time()
            scores = [corpus(list(range(counts.shape[1])))]
            if (time.process_time() - began) * len(counts) <= SECONDS:
                break
        else:
            return {}
        scores += [corpus(np.repeat(np.arange(len(c)), c).tolist()) for c in counts[1:]]
        return {name: np.array([s.get(name, np.nan) for s in scores]) for name in scores[0]}


def ratio(above: np.ndarray, below: np.ndarray, empty: float = 0.0) -> np.ndarray:
    """above / below, elementwise; `empty` where below is 0."""
    return np.divide(above, below, out=np.full(above.shape, empty, dtype=np.float64), where=below != 0)
