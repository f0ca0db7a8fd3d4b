"""Compare two models on the same rows: the difference of each score, its interval and its p-value, by a paired bootstrap.

Definition. The rows are drawn with replacement, as many as there are, RESAMPLES times with a fixed seed, and both models are scored on
each draw; a corpus score (BLEU, CIDEr, macro-F1) is that of the drawn rows. Interval: the 2.5th and the 97.5th percentile of the
differences. p, two-sided: twice the share of the resamples whose difference is 0 or has the rarer sign, the rows themselves counted as
one of these; below 0.05 where the interval does not hold 0. Source: Efron and Tibshirani, "An Introduction to the Bootstrap", 1993,
chapters 13 and 16; Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004, for corpus scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from ..common.records import AnswerRecord, Difference
from .metrics.base import MetricSet, problem_of

if TYPE_CHECKING:
    import numpy as np

    from .metrics.draws import Draws

FEWEST = 2  # rows of which something can be said
CONFIDENCE = 0.95
LOSS = "eval_loss"


def differences(metrics: MetricSet, first: Sequence[AnswerRecord], second: Sequence[AnswerRecord]) -> dict[str, Difference]:
    """score -> second minus first on the rows that both have; `eval_loss` too if the rows have their losses.

    Of a mix also `SCORE/SOURCE` and `loss/SOURCE`, on the rows of each source alone. Left out: scores that no row has, that are no finite number, and that would
    take too long (Draws.recomputed).
    """
    pairs = paired(first, second)
    result = _differences(metrics, pairs)
    for source in dict.fromkeys(row["source"] for row, _ in pairs if row.get("source")):
        own = _differences(metrics, [pair for pair in pairs if pair[0].get("source") == source])
        result |= {f"{'loss' if name == LOSS else name}/{source}": gap for name, gap in own.items()}
    return result


def _differences(metrics: MetricSet, pairs: Sequence[tuple[AnswerRecord, AnswerRecord]]) -> dict[str, Difference]:
    result = _loss_difference(pairs)
    for key, metric in metrics.metrics.items():
        usable = [pair for pair in pairs if all(r.get("prediction") is not None and problem_of(metric, r) is None for r in pair)]
        if len(usable) < FEWEST:
            continue
        try:
            one, two = (metric.resampled(rows, [r.get("metrics") or {} for r in rows], _draws(len(rows))) for rows in map(list, zip(*usable, strict=True)))
        except Exception as error:  # a metric may be a user's own code
            metrics.fail(key, "its interval", error)
            continue
        found = {name: difference(one[name], two[name], len(usable)) for name in one if name in two}
        result |= {name: gap for name, gap in found.items() if gap is not None}
    return result


def paired(first: Sequence[AnswerRecord], second: Sequence[AnswerRecord]) -> list[tuple[AnswerRecord, AnswerRecord]]:
    """The rows of `first` with the same row of `second`: the same name, images and references."""
    other = {_identity(row): row for row in second}
    return [(row, other[key]) for row in first if (key := _identity(row)) in other]


def difference(first: np.ndarray, second: np.ndarray, rows: int) -> Difference | None:
    """first, second: the scores of every resample, the observed ones first (Draws). None if one of the observed is no finite number."""
    import numpy as np

    gaps = second - first
    drawn = gaps[1:][np.isfinite(gaps[1:])]
    observed = float(gaps[0])
    if not np.isfinite(observed) or not len(drawn):
        return None
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    other = min((drawn <= 0).sum(), (drawn >= 0).sum())
    return {"value": observed, "low": float(low), "high": float(high), "p": min(1.0, float(2 * (1 + other) / (1 + len(drawn)))), "rows": rows, "resamples": len(drawn)}


def is_noise(gap: Difference | None) -> bool:
    """Whether a difference is known to be within noise: its interval holds 0."""
    return gap is not None and gap["low"] <= 0 <= gap["high"]


def _identity(row: AnswerRecord) -> tuple[object, ...]:
    return row.get("id", row.get("index")), tuple(row.get("images") or ()), tuple(row.get("references") or ())


def _loss_difference(pairs: Sequence[tuple[AnswerRecord, AnswerRecord]]) -> dict[str, Difference]:
    import numpy as np

    from .metrics.draws import ratio

    known = [pair for pair in pairs if all(r.get("loss_tokens") for r in pair)]
    if len(known) < FEWEST:
        return {}
    sums = _draws(len(known)).sums(np.array([[number for r in pair for number in (r["loss"], r["loss_tokens"])] for pair in known], dtype=np.float64))
    gap = difference(ratio(sums[:, 0], sums[:, 1], np.nan), ratio(sums[:, 2], sums[:, 3], np.nan), len(known))
    return {LOSS: gap} if gap is not None else {}


@lru_cache(maxsize=2)  # the draws of so many rows are always the same
def _draws(rows: int) -> Draws:
    from .metrics.draws import Draws

    return Draws.of(rows)
