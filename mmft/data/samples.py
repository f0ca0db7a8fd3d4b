"""What `mmft.prepare` returns: a prepared data set by its splits, and the rows of a split as a sequence, a DataFrame or a datasets.Dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets
    import pandas

    from .prepared import PreparedData
    from .sample import Sample


class Samples(Sequence["Sample"]):
    """The rows of one split, read from the disk when they are asked for."""

    def __init__(self, rows: Sequence[Sample], name: str):
        self._rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return [self._rows[i] for i in range(*index.indices(len(self)))] if isinstance(index, slice) else self._rows[index]

    def to_pandas(self) -> pandas.DataFrame:
        """id, images (paths), prompt, answer, references, choices; of a mix the source."""
        from .frames import to_pandas

        return to_pandas(self._rows)

    def to_dataset(self) -> datasets.Dataset:
        """The same as a datasets.Dataset with images and messages."""
        from .frames import to_dataset

        return to_dataset(self._rows)

    def __repr__(self) -> str:
        return f"<Samples of {self.name}: {len(self)} rows>"


class Prepared(Mapping[str, Samples]):
    """A prepared data set: prepared["train"] are its training rows."""

    def __init__(self, data: PreparedData):
        self._data = data

    @property
    def path(self) -> Path:
        return self._data.path

    @property
    def fingerprint(self) -> str:
        """One hash of all rows and image contents."""
        return self._data.fingerprint

    def __getitem__(self, split: str) -> Samples:
        if split not in self._data.splits:
            raise KeyError(split)
        return Samples(self._data.split(split), split)

    def __iter__(self) -> Iterator[str]:
        return iter(self._data.splits)

    def __len__(self) -> int:
        return len(self._data.splits)

    def __repr__(self) -> str:
        return f"<Prepared {self._data.manifest['name']}: {', '.join(f'{name} {rows}' for name, rows in self._data.splits.items())}>"

    def _repr_html_(self) -> str:
        return "<br>".join(map(escape, self._data.describe()))
