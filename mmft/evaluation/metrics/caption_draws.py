"""BLEU-4 and CIDEr of every bootstrap resample, from counts of n-grams that are taken once (numpy, scipy's sparse matrices).

Both are computed anew for each resample, as pycocoevalcap would from its rows. A row that was drawn twice is two rows: it counts twice
among the rows of CIDEr, and so do the words of its references.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .draws import CELLS, Draws, ratio

if TYPE_CHECKING:
    from scipy.sparse import csr_array

LENGTHS = (1, 2, 3, 4)  # of n-grams
SIGMA = 6.0  # of CIDEr-D's penalty of the length, pycocoevalcap's default
SMALL, TINY = 1e-9, 1e-15  # pycocoevalcap adds them below and above each fraction of BLEU


def bleu4(answers: Sequence[str], references: Sequence[Sequence[str]], draws: Draws) -> np.ndarray:
    """(resamples,) corpus BLEU-4 with the closest reference length, as pycocoevalcap's BleuScorer computes it."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=4)
    for answer, texts in zip(answers, references, strict=True):
        scorer += (answer, list(texts))
    counts = []
    for row in scorer.ctest:
        closest = min((abs(length - row["testlen"]), length) for length in row["reflen"])[1]
        counts.append([*row["correct"], *row["guess"], row["testlen"], closest])
    sums = draws.sums(np.array(counts, dtype=np.float64))
    precision = ((sums[:, :4] + TINY) / (sums[:, 4:8] + SMALL)).prod(axis=1) ** 0.25
    length = (sums[:, 8] + TINY) / (sums[:, 9] + SMALL)
    return precision * np.exp(np.minimum(0.0, 1 - 1 / length))


def cider(answers: Sequence[str], references: Sequence[Sequence[str]], draws: Draws) -> np.ndarray:
    """(resamples,) CIDEr-D, as pycocoevalcap's CiderScorer computes it; the weights of the words are those of each resample."""
    pairs = [row for row, texts in enumerate(references) for _ in texts]  # the row of each reference
    in_answers = [_grams(text) for text in answers]
    in_references = [_grams(text) for texts in references for text in texts]
    penalty = np.exp([-((_bigrams(in_answers[row]) - _bigrams(grams)) ** 2) / (2 * SIGMA**2) for row, grams in zip(pairs, in_references, strict=True)])
    share = np.array([10 / (len(LENGTHS) * len(references[row])) for row in pairs])  # of a reference in the score of its row
    scores = np.zeros(len(draws.counts))
    for n in LENGTHS:
        scores += _one_length([g[n] for g in in_answers], [g[n] for g in in_references], pairs, penalty * share, draws)
    return scores


def _one_length(answers: list[dict[Any, int]], references: list[dict[Any, int]], pairs: list[int], factor: np.ndarray, draws: Draws) -> np.ndarray:
    """(resamples,) the part of n-grams of one length. Similarity of answer and reference: cosine with clipped counts."""
    number = {gram: i for i, gram in enumerate(dict.fromkeys(gram for grams in (*answers, *references) for gram in grams))}
    if not number:
        return np.zeros(len(draws.counts))
    rows = draws.counts.shape[1]
    there: list[dict[Any, int]] = [{} for _ in range(rows)]  # the n-grams in the references of each row
    for row, grams in zip(pairs, references, strict=True):
        there[row] |= dict.fromkeys(grams, 1)
    both = [{g: min(answers[row].get(g, 0), c) * c for g, c in grams.items() if g in answers[row]} for row, grams in zip(pairs, references, strict=True)]
    present, common = _matrix(there, number), _matrix(both, number)
    answer_squares, reference_squares = _matrix([_squares(g) for g in answers], number), _matrix([_squares(g) for g in references], number)
    scores, step = [], max(1, CELLS // max(len(number), len(pairs)))
    for start in range(0, len(draws.counts), step):
        counts = draws.counts[start : start + step].astype(np.float64)
        weight = (np.log(rows) - np.log(np.maximum(1.0, present.T @ counts.T))) ** 2  # (n-grams, resamples)
        norms = np.sqrt((answer_squares @ weight)[pairs] * (reference_squares @ weight))
        similarity = ratio(common @ weight, norms) * factor[:, None]  # (references, resamples)
        scores.append((similarity * counts.T[pairs]).sum(axis=0) / rows)
    return np.concatenate(scores)


def _grams(text: str) -> dict[int, dict[Any, int]]:
    """length -> n-gram -> how often it occurs."""
    from pycocoevalcap.cider.cider_scorer import precook

    found: dict[int, dict[Any, int]] = {n: {} for n in LENGTHS}
    for gram, count in precook(text, LENGTHS[-1]).items():
        found[len(gram)][gram] = count
    return found


def _bigrams(grams: dict[int, dict[Any, int]]) -> int:
    """What pycocoevalcap takes for the length of a text."""
    return sum(grams[2].values())


def _squares(grams: dict[Any, int]) -> dict[Any, int]:
    return {gram: count * count for gram, count in grams.items()}


def _matrix(rows: Sequence[dict[Any, int]], number: dict[Any, int]) -> csr_array:
    """(rows, n-grams) of counts."""
    from scipy.sparse import csr_array

    ends = np.cumsum([0, *(len(grams) for grams in rows)])
    values = np.array([count for grams in rows for count in grams.values()], dtype=np.float64)
    return csr_array((values, np.array([number[gram] for grams in rows for gram in grams], dtype=np.int64), ends), shape=(len(rows), len(number)))
