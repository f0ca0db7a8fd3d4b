"""Which rows of a prepared set a verb uses: training rows, held-out rows, the first rows of a split."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, zip_longest
from typing import Any

from ..common.errors import UserError
from .prepared import PreparedData
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


class MixedRows(Sequence[Sample]):
    """The rows of several sources, one source after another. parts: source -> its rows. Ids begin with the source: `chat/17`."""

    def __init__(self, parts: Mapping[str, Sequence[Sample]]):
        self.parts = dict(parts)
        self._names, self._ends = list(self.parts), list(accumulate(map(len, self.parts.values())))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        n = bisect_right(self._ends, index)
        name = self._names[n]
        rows = self.parts[name]
        sample = rows[index - self._ends[n] + len(rows)]
        return replace(sample, id=f"{name}/{sample.id}", source=name)


def source_of(row_id: str) -> str:
    """The source in the id of a row of a mix."""
    return row_id.partition("/")[0]


def parts_of(rows: Sequence[Sample]) -> dict[str, Sequence[Sample]]:
    """source -> its rows; {"": rows} for a single data set."""
    return rows.parts if isinstance(rows, MixedRows) else {"": rows}


def alternating(rows: Sequence[Sample]) -> Sequence[Sample]:
    """The same rows, of a mix a row of each source in turn: the first ones show all sources."""
    if not isinstance(rows, MixedRows):
        return rows
    starts = list(accumulate([0, *map(len, rows.parts.values())]))[:-1]
    turns = zip_longest(*(range(start, start + len(part)) for start, part in zip(starts, rows.parts.values())))
    return Selection(rows, [index for turn in turns for index in turn if index is not None])


def first_rows(rows: Sequence[Sample], n: int | None) -> Sequence[Sample]:
    """The first `n` rows (null: all), of a mix those of each source."""
    return MixedRows({name: Subset(part, n) for name, part in rows.parts.items()}) if isinstance(rows, MixedRows) else Subset(rows, n)


class Selection(Sequence[Sample]):
    """The rows at some indices of `rows`, which are read only when asked for."""

    def __init__(self, rows: Sequence[Sample], indices: Sequence[int]):
        self.rows, self.indices = rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[self.indices[index]]


def good_rows(rows: Sequence[Sample]) -> Sequence[Sample]:
    """The rows whose answer is not labelled bad; the same sequence if there is none."""
    if isinstance(rows, MixedRows):
        parts = {name: good_rows(part) for name, part in rows.parts.items()}
        return rows if all(parts[name] is part for name, part in rows.parts.items()) else MixedRows({name: part for name, part in parts.items() if len(part)})
    good = [i for i in range(len(rows)) if rows[i].label is not False]
    return rows if len(good) == len(rows) else Selection(rows, good)


class Weighted(Sequence[Sample]):
    """Rows whose losses are multiplied by `weight`."""

    def __init__(self, rows: Sequence[Sample], weight: float):
        self.rows, self.weight = rows, weight

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return replace(self.rows[index], weight=self.weight)


def spread(rows: Sequence[Sample], n: int = 1000) -> Iterator[Sample]:
    """At most `n` rows, evenly spaced."""
    count = min(n, len(rows))
    return (rows[i * len(rows) // count] for i in range(count))


def evaluation_rows(prepared: PreparedData, evaluation: Mapping[str, Any]) -> Sequence[Sample]:
    """The rows to measure, by the config's section `evaluation`. Raises UserError for a split that the set does not have."""
    name = evaluation["split"]
    if name is None:
        raise UserError(f"evaluation.split must be given: this run held nothing out; the set holds {prepared.splits}")
    if not prepared.splits.get(name):
        raise UserError(f"evaluation.split={name}: the prepared set has no such rows, it holds {prepared.splits}")
    rows = first_rows(prepared.split(name), evaluation["max_samples"])
    return good_rows(rows) if prepared.manifest.get("bad") else rows


def split_rows(prepared: PreparedData, evaluation: Mapping[str, Any]) -> tuple[Sequence[Sample], Sequence[Sample] | None]:
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
    return prepared.split("train"), first_rows(prepared.split(name), evaluation["max_samples"])
