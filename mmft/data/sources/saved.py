"""SavedDataset: a folder written by `datasets.save_to_disk`, a Dataset or a DatasetDict."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...common.errors import UserError, nearest
from ..readers import files
from ..sample import BadRow, Row
from ..splits import ALIASES
from .base import Stamp, file_stamp
from .columns import ColumnKeys, PositionKey

BATCH = 64  # rows read from Arrow at once; each may contain the bytes of images


@dataclass(kw_only=True)
class SavedDataset(ColumnKeys, PositionKey):
    """path: the folder. split: use only this split of a DatasetDict, or those of a list, each under its own split name; null: all of them."""

    path: str
    split: str | Sequence[str] | None = None

    def data_root(self) -> Path:
        return Path(self.root or self.path).expanduser()

    def stamp(self) -> Stamp:
        folder = files.existing(self.path, folder=True)
        found = sorted([*folder.rglob("state.json"), *folder.rglob("*.arrow")])
        if not found:
            raise UserError(f"data.path={self.path}: holds no data set saved by datasets.save_to_disk (no state.json)")
        return {"files": [file_stamp(f) for f in found], "root": self.data_root().resolve().as_posix()}

    def load(self) -> Any:
        from datasets import load_from_disk

        try:
            return load_from_disk(str(files.existing(self.path, folder=True)))
        except Exception as error:
            raise UserError(f"data.path={self.path}: cannot be read as a saved data set: {' '.join(str(error).split())[:300]}") from None

    def read(self) -> Iterator[Row | BadRow]:
        for name, dataset in named_splits(self.load(), self.split, self.path):
            yield from dataset_rows(dataset, name, self, self.image_position, name or Path(self.path).name)


def named_splits(loaded: Any, wanted: str | Sequence[str] | None, where: str) -> list[tuple[str | None, Any]]:
    """[(split name, data set)] of a loaded data set. The name is None if there is one split only, or `wanted`: its rows will be divided.

    Raises UserError for a split that does not exist, or whose name is not a known split name.
    """
    if not isinstance(loaded, Mapping):
        return [(None, loaded)]
    names = list(loaded)
    for each in [wanted] if isinstance(wanted, str) else wanted or ():
        if each not in names:
            raise UserError(f"data.split={each}: {where} has no such split.{nearest(str(each), names)} It has: {', '.join(names)}.")
    if isinstance(wanted, str):
        return [(None, loaded[wanted])]
    if wanted is not None:
        names = list(wanted)
    if len(names) == 1:
        return [(None, loaded[names[0]])]
    unknown = [n for n in names if n.lower() not in ALIASES]
    if unknown:
        raise UserError(f"data.split must be given: {where} has the splits {', '.join(names)}, and {unknown[0]} is not a known name for one")
    return [(n, loaded[n]) for n in names]


def dataset_rows(dataset: Any, split: str | None, keys: ColumnKeys, position: str, label: str,
                 fetch: Callable[[str], bytes | str] | None = None, most: int | None = None) -> Iterator[Row | BadRow]:
    """Rows of a datasets.Dataset or IterableDataset. fetch: returns the bytes of an image that is given by its path. most: see `records`."""
    for number, record in enumerate(records(dataset, fetch, most), 1):
        if number == 1:
            keys.columns.check(record, label)
        for row in keys.columns.rows(record, f"{label}[{number}]", keys.prompt, position, keys.captions, keys.boxes):
            if isinstance(row, Row) and split is not None:
                row.split = split
            yield row


def records(dataset: Any, fetch: Callable[[str], bytes | str] | None = None, most: int | None = None) -> Iterator[dict[str, Any]]:
    """Records as stored in Arrow: images as {bytes, path}, not decoded; class labels as their names.

    most: the number of records that are wanted: of a stream no more are read, since a further one may lie in a file that is not downloaded yet.
    """
    features = getattr(dataset, "features", None) or {}
    labels = {name: f.names for name, f in features.items() if type(f).__name__ == "ClassLabel"}
    size = BATCH if most is None else next(n for n in range(min(BATCH, most), 0, -1) if most % n == 0)
    for table in islice(dataset.with_format("arrow").iter(batch_size=size), None if most is None else most // size):
        for record in table.to_pylist():
            for name, names in labels.items():
                if isinstance(record.get(name), int):
                    record[name] = names[record[name]]
            yield {k: _fetched(v, fetch) for k, v in record.items()} if fetch else record


def _fetched(value: Any, fetch: Callable[[str], bytes | str]) -> Any:
    if isinstance(value, list) and value and isinstance(value[0], dict) and value[0].keys() == {"bytes", "path"}:
        return [_fetched(v, fetch) for v in value]
    if isinstance(value, dict) and value.keys() == {"bytes", "path"} and value["bytes"] is None and value["path"]:
        return fetch(value["path"])
    return value


def is_remote(path: str) -> bool:
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None
