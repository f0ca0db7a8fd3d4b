"""Metric of answers that are one of a few classes: accuracy, macro-F1, confusion matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...common.records import AnswerRecord, ConfusionMatrix, MetricValues
from .base import Metric, Score, means
from .words import normalise

if TYPE_CHECKING:
    from .draws import Draws, Resampled

OTHER = "(other)"  # an answer that is none of the classes
MAX_CLASSES = 30  # shown in the confusion matrix, the most frequent ones


class Classes(Metric):
    """The classes are the rows' first references. An answer belongs to the class whose normalised text it equals.

    class_accuracy: share of answers of the right class. macro_f1: the mean of the F1 of every class; answers that are no class are
    misses of the row's class and no hits of another (scikit-learn's f1_score with average="macro" and labels of the references).
    """

    SCORES = (Score("class_accuracy", "Class accuracy"), Score("macro_f1", "Macro-F1 over classes"))

    def row(self, row: AnswerRecord) -> MetricValues:
        return {"class_accuracy": float(normalise(str(row["prediction"])) == normalise(row["references"][0]))}

    def corpus(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues]) -> MetricValues:
        pairs = _pairs(rows)
        hits = Counter(wanted for wanted, given in pairs if wanted == given)
        wanted_counts, given_counts = Counter(wanted for wanted, _ in pairs), Counter(given for _, given in pairs)
        f1 = [2 * hits[c] / (wanted_counts[c] + given_counts[c]) for c in wanted_counts]
        return {**means(["class_accuracy"], values), "macro_f1": sum(f1) / len(f1)}

    def resampled(self, rows: Sequence[AnswerRecord], values: Sequence[MetricValues], draws: Draws) -> Resampled:
        import numpy as np

        from .draws import ratio

        pairs = _pairs(rows)
        labels = list(dict.fromkeys(wanted for wanted, _ in pairs))
        is_wanted, is_given = (np.array([[pair[side] == label for label in labels] for pair in pairs], dtype=np.float64) for side in (0, 1))
        wanted, given, hits = draws.sums(is_wanted), draws.sums(is_given), draws.sums(is_wanted * is_given)
        there = wanted > 0  # the classes of a resample are those of its references
        f1 = np.where(there, ratio(2 * hits, wanted + given), 0.0)
        return {**draws.means(["class_accuracy"], values), "macro_f1": f1.sum(axis=1) / there.sum(axis=1)}

    def confusion(self, rows: Sequence[AnswerRecord]) -> ConfusionMatrix | None:
        """Rows of the matrix are references, columns are answers; `examples` has the index of a row for each cell that is not empty."""
        usable = [r for r in rows if self.problem(r) is None]
        if not usable:
            return None
        pairs = _pairs(usable)
        frequent = [c for c, _ in Counter(wanted for wanted, _ in pairs).most_common(MAX_CLASSES)]
        labels = [*sorted(frequent), OTHER]
        number = {label: i for i, label in enumerate(labels)}
        counts = [[0] * len(labels) for _ in labels]
        examples: list[list[int | None]] = [[None] * len(labels) for _ in labels]
        for row, (wanted, given) in zip(usable, pairs, strict=True):
            i, j = number.get(wanted, number[OTHER]), number.get(given, number[OTHER])
            counts[i][j] += 1
            if examples[i][j] is None:
                examples[i][j] = row.get("index")
        names = {normalise(r["references"][0]): r["references"][0].strip() for r in reversed(usable)}
        return {"labels": [names.get(label, label) for label in labels], "counts": counts, "examples": examples}


def _pairs(rows: Sequence[AnswerRecord]) -> list[tuple[str, str]]:
    """(class of the reference, class of the answer or OTHER) of each row."""
    wanted = [normalise(r["references"][0]) for r in rows]
    classes = set(wanted)
    given = [normalise(str(r["prediction"])) for r in rows]
    return [(w, g if g in classes else OTHER) for w, g in zip(wanted, given, strict=True)]
