"""Which rows of a prepared set a verb uses: training rows, held-out rows, the first rows of a split."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..common.errors import UserError
from .prepared import PreparedData, Rows
from .sample import Sample


class Subset(Sequence[Sample]):
    """The first `n` rows (null: all) of `rows`, which are read only when asked for."""

    def __init__(self, rows: Sequence[Sample], n: int | None):
        self.rows, self.n = rows, len(rows) if n is None else min(n, len(rows))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if not -self.n <= index < self.n:
            raise IndexError(index)
        return self.rows[index % self.n]


class Selection(Sequence[Sample]):
    """The rows at some indices of `rows`, which are read only when asked for."""

    def __init__(self, rows: Sequence[Sample], indices: Sequence[int]):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.indices[index]]


def spread(rows: Sequence[Sample], n: int = 1000) -> Iterator[Sample]:
    """At most `n` rows, evenly spaced."""
    count = min(n, len(rows))
    return (rows[i * len(rows) // count] for i in range(count))


def evaluation_rows(prepared: PreparedData, evaluation: Mapping[str, Any]) -> Subset:
    """The rows to measure, by the config's section `evaluation`. Raises UserError for a split that the set does not have."""
    name = evaluation["split"]
    if name is None:
        raise UserError(f"evaluation.split must be given: this run held nothing out; the set holds {prepared.splits}")
    if not prepared.splits.get(name):
        raise UserError(f"evaluation.split={name}: the prepared set has no such rows, it holds {prepared.splits}")
    return Subset(prepared.split(name), evaluation["max_samples"])


def split_rows(prepared: PreparedData, evaluation: Mapping[str, Any]) -> tuple[Rows, Subset | None]:
    """(training rows, held-out rows or None). Raises UserError for a split that the set does not have."""
    if not prepared.splits.get("train"):
        raise UserError(f"{prepared.path}: the set has no training rows; it holds {prepared.splits}")
    name = evaluation["split"]
    if name is None:
        return prepared.split("train"), None
    if not prepared.splits.get(name):
        raise UserError(
            f"evaluation.split={name}: the prepared set has no such rows, it holds {prepared.splits}; set data.splits.{name}=0.1,"
            " or evaluation.split=null to train without measuring"
        )
    return prepared.split("train"), Subset(prepared.split(name), evaluation["max_samples"])
