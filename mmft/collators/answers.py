"""AnswerCollator: batches of rows with all their answers: chosen and rejected ones, or an answer and that of another row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ..common.errors import RowError
from ..data.sample import Sample, with_answer
from .types import Batch, BatchMaker, Measure

if TYPE_CHECKING:
    from .base import Collator

    C = TypeVar("C", bound="BatchMaker | Collator")

CHOSEN, REJECTED = 1, 0  # kinds of answers
# keys of a batch: what its sequences are, their reference log-probabilities, and a batch of the same prompts with answers of other rows
KIND, REFERENCE, MISMATCHED = "answer_kind", "answer_reference", "answer_mismatched"


class AnswerCollator:
    """A collator whose training batches hold every answer of a row as a sequence of its own; in all else the collator it wraps.

    The sequences of a row follow each other and show the same images, so a feature cache in the wrapped collator computes these once. A row
    with a rejected answer gives CHOSEN and REJECTED; one with a label alone gives one of the two. Only the last answer carries loss.
    others: row id -> the answers of another row, the chosen one first, for the batch MISMATCHED; None for none. reference: log-probability of
    each answer by its sample's `content`; an empty one gives zeros.
    """

    def __init__(self, collator: Any, others: Mapping[str, Sequence[str]] | None = None, reference: Mapping[str, float] | None = None):
        self.collator, self.others, self.reference = collator, others, dict(reference or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "collator":  # while a copy is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def answers(self, sample: Sample) -> list[tuple[Sample, int]]:
        """(the row with one of its answers, the kind of the answer), in the order of a batch."""
        own = [(with_answer(sample, sample.messages[-1]), REJECTED if sample.label is False and not sample.rejected else CHOSEN)]
        return [*own, (with_answer(sample, sample.rejected), REJECTED)] if sample.rejected else own

    def mismatched(self, sample: Sample) -> list[Sample]:
        """The row with an answer of another row in place of each of its own; [] without `others`."""
        if self.others is None:
            return []
        others = self.others[sample.id]
        return [with_answer(sample, others[min(n, len(others) - 1)]) for n in range(2 if sample.rejected else 1)]

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of all answers, with KIND (B,) int64 and REFERENCE (B,) float32. Raises RowError as the wrapped collator does."""
        import torch

        answers = [each for sample in samples for each in self.answers(sample)]
        batch = self._compared([sample for sample, _ in answers])
        batch[KIND] = torch.tensor([kind for _, kind in answers])
        if self.others is not None:
            batch[MISMATCHED] = self._compared([other for sample in samples for other in self.mismatched(sample)])
            del batch[MISMATCHED]["row_ids"]
        return batch

    def _compared(self, answers: Sequence[Sample]) -> Batch:
        """The batch of these answers with REFERENCE. Raises RowError for an answer that becomes several sequences."""
        import torch

        batch = dict(self.collator(answers))
        rows = batch["row_ids"]
        if len(rows) != len(answers):
            row = next((a.id for a in answers if rows.count(a.id) != sum(other.id == a.id for other in answers)), answers[0].id)
            raise RowError(row, "one of its answers becomes several sequences, which cannot be compared with another answer")
        batch[REFERENCE] = torch.tensor([self.reference[answer.content] for answer in answers] if self.reference else [0.0] * len(answers))
        return batch

    def sequences(self, samples: Sequence[Sample]) -> Batch:
        """The batch of all answers as a batch of plain rows: what an audit shows and counts."""
        batch = self(samples)
        return {key: value for key, value in batch.items() if key not in (KIND, REFERENCE, MISMATCHED)}

    def measure(self, sample: Sample) -> Measure:
        """The size of a row: its answers are so many sequences, and as long as the longest; `loss_tokens` is that of the shortest. Raises RowError, ImageError."""
        sizes = [self.collator.measure(answer) for answer, _ in self.answers(sample)]
        return Measure(max(s.tokens for s in sizes), min(s.loss_tokens for s in sizes), sum(s.sequences for s in sizes))


def other_answers(rows: Sequence[Sample]) -> dict[str, list[str]]:
    """row id -> the answers of the row before it, the last row's for the first: what KTO pairs with a prompt that they do not answer."""
    texts = [(row.id, [row.answer_text, *([row.rejected] if row.rejected else [])]) for row in (rows[i] for i in range(len(rows)))]
    return {row: texts[i - 1][1] for i, (row, _) in enumerate(texts)}
