"""Answer many rows: ordered by length, images read as rows enter the batch, by our decoding loop or, where it cannot, by transformers'."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..collators.types import Batch, BatchMaker
from ..common.errors import UserError
from ..data.sample import Sample
from ..data.selection import Selection
from ..system.distributed import world_size

if TYPE_CHECKING:
    from transformers import GenerationConfig

WINDOW = 256  # rows that are ordered at once; their answers wait in memory until the rows before them are answered


@dataclass(frozen=True)
class Answer:
    """A generated or chosen text. truncated: it reached generation.max_new_tokens without an end token. probabilities: of each choice."""

    text: str
    truncated: bool = False
    probabilities: dict[str, float] | None = None


Outcome = tuple[int, Answer | UserError]  # (index of the row, its answer or why it cannot be read)
AnswerBatch = Callable[[Any, Batch], list[Answer]]  # the answers to one prompt batch by transformers' `generate`


@dataclass
class RowGenerator:
    """Answers rows by one model's settings. size: rows generated together.

    reason: why transformers' `generate` has to answer them in batches, "" if it has not; known after the first rows.
    """

    collator: BatchMaker
    settings: GenerationConfig
    size: int
    answer_batch: AnswerBatch
    reason: str = ""

    def answers(self, model: Any, rows: Sequence[Sample]) -> Iterator[Outcome]:
        """The answers to all rows, in the order in which they end. Raises UserError for settings that transformers refuses."""
        from .decode import Undecodable

        done: set[int] = set()
        if world_size() > 1:
            self.reason = "several processes generate the same rows"
        if not self.reason:
            try:
                for index, answer in self._decoded(model, rows):
                    done.add(index)
                    yield index, answer
                return
            except Undecodable as why:
                self.reason = str(why)
        left = [i for i in range(len(rows)) if i not in done]
        for index, answer in self._batches(model, Selection(rows, left)):
            yield left[index], answer

    def _decoded(self, model: Any, rows: Sequence[Sample]) -> Iterator[Outcome]:
        from .decode import decode, group_size

        reader = Reader(self.collator, rows)
        groups = reader.groups(by_length(self.collator, rows), group_size(self.size))
        for row in decode(model, groups, self.settings, self.size):
            yield row.key, Answer(self.collator.decode([row.ids])[0], not row.ended)
            yield from reader.take_failures()
        yield from reader.take_failures()

    def _batches(self, model: Any, rows: Sequence[Sample]) -> Iterator[Outcome]:
        """Batches of `size` rows; with sampling in the rows' own order, since what is drawn depends on the batch."""
        reader = Reader(self.collator, rows)
        order = iter(range(len(rows))) if self.settings.do_sample else by_length(self.collator, rows)
        for indices, batch in reader.groups(order, self.size):
            yield from zip(indices, self.answer_batch(model, batch), strict=True)
            yield from reader.take_failures()
        yield from reader.take_failures()


class Reader:
    """Reads rows as prompt batches; rows that cannot be read are left out and kept in `failures`."""

    def __init__(self, collator: BatchMaker, rows: Sequence[Sample]):
        self.collator, self.rows = collator, rows
        self.failures: deque[tuple[int, UserError]] = deque()

    def groups(self, order: Iterator[int], size: int) -> Iterator[tuple[list[int], Batch]]:
        """(indices, prompt batch) of `size` rows each, read when they are asked for."""
        for part in _chunks(order, size):
            if (group := self._read(part)) is not None:
                yield group

    def _read(self, indices: list[int]) -> tuple[list[int], Batch] | None:
        """Rows are tried one by one only if their batch fails, so that a good batch opens each image once."""
        samples = {i: self.rows[i] for i in indices}
        try:
            return indices, self.collator.prompt(list(samples.values()))
        except UserError:
            pass
        good = []
        for i, sample in samples.items():
            try:
                self.collator.prompt([sample])
                good.append(i)
            except UserError as error:
                self.failures.append((i, error))
        return (good, self.collator.prompt([samples[i] for i in good])) if good else None

    def take_failures(self) -> Iterator[tuple[int, UserError]]:
        """The failures since the last call."""
        while self.failures:
            yield self.failures.popleft()


def by_length(collator: BatchMaker, rows: Sequence[Sample]) -> Iterator[int]:
    """The indices of `rows`, each WINDOW of them with the longest first.

    Prompts of about one length need little padding. A long answer that starts early ends while other rows still fill the batch; how long
    it will be is guessed from the reference, where there is one.
    """
    for start in range(0, len(rows), WINDOW):
        part = range(start, min(start + WINDOW, len(rows)))
        yield from sorted(part, key=lambda i: _length(collator, rows[i]), reverse=True)


def _length(collator: BatchMaker, sample: Sample) -> int:
    """Tokens of a row with its first reference; 0 for a row that cannot be read."""
    try:
        return collator.measure(sample).tokens
    except UserError:
        return 0


def _chunks(items: Iterator[int], size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
