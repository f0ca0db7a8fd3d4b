"""Collect all captions of each image of a COCO copy, in any of the usual layouts, with flat memory use."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...common.errors import UserError
from .cells import texts
from .hub import fetch
from .saved import records

IMAGE_COLUMNS = ("image", "img", "jpg")
CAPTION_COLUMNS = ("captions", "caption", "sentences", "sentences_raw", "text", "answer")
ID_COLUMNS = ("image_id", "cocoid", "imgid", "img_id", "filename", "file_name", "id")

#: (image id, image cell, captions, name of the row in messages)
Captioned = tuple[str, Any, list[str], str]


class Captions:
    """Captions by image id, in an SQLite file."""

    def __init__(self, path: Path):
        self._db = sqlite3.connect(path, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("CREATE TABLE captions (image TEXT, caption TEXT)")
        self._db.execute("CREATE TABLE used (image TEXT PRIMARY KEY)")
        self._db.execute("BEGIN")

    def add(self, pairs: Iterable[tuple[str, Any]]) -> None:
        """Add all pairs (image id, a caption or a list of captions); called once."""
        self._db.executemany("INSERT INTO captions VALUES (?, ?)", ((i, t) for i, cell in pairs for t in texts(cell)))
        self._db.execute("CREATE INDEX by_image ON captions (image)")

    def of(self, image: str) -> list[str]:
        rows = self._db.execute("SELECT caption FROM captions WHERE image = ? ORDER BY rowid", (image,))
        return list(dict.fromkeys(text for (text,) in rows))

    def first_time(self, image: str) -> bool:
        """True at the first call for `image`."""
        return self._db.execute("INSERT OR IGNORE INTO used VALUES (?)", (image,)).rowcount == 1

    def close(self) -> None:
        self._db.close()


@contextmanager
def caption_table() -> Iterator[Captions]:
    with tempfile.TemporaryDirectory(prefix="mmft-coco-") as scratch:
        table = Captions(Path(scratch) / "captions.sqlite")
        try:
            yield table
        finally:
            table.close()


def columns_of(names: Iterable[str], label: str) -> tuple[str, str, str | None]:
    """The columns of image, caption and image id. Raises UserError without an image or caption column."""
    names = list(names)
    image, caption, key = (next((c for c in known if c in names), None) for known in (IMAGE_COLUMNS, CAPTION_COLUMNS, ID_COLUMNS))
    if image is None or caption is None:
        raise UserError(f"{label}: has no column for the {'image' if image is None else 'caption'}; it has {', '.join(names)}."
                        " Read it with data=hub and data.columns")
    return image, caption, key


def stored_images(dataset: Any, label: str, limit: int | None) -> Iterator[Captioned]:
    """Each image of a stored data set once, in the order of first rows, with the captions of all its rows."""
    image, caption, key = columns_of(dataset.column_names, label)

    def name_of(record: dict[str, Any], number: int) -> str:
        return str(record[key]) if key and record[key] is not None else str(number)

    with caption_table() as captions:
        words = dataset.select_columns([c for c in (key, caption) if c])
        captions.add((name_of(r, n), r[caption]) for n, r in enumerate(records(words), 1))
        count = 0
        for number, record in enumerate(records(dataset, fetch), 1):
            name = name_of(record, number)
            if captions.first_time(name):
                yield name, record[image], captions.of(name), f"{label}[{number}]"
                count += 1
                if count == limit:
                    return


def streamed_images(dataset: Any, label: str, limit: int) -> Iterator[Captioned]:
    """The first `limit` images of a stream with the captions read so far; the rest is not downloaded."""
    images: dict[str, Captioned] = {}
    for number, record in enumerate(records(dataset, fetch), 1):
        image, caption, key = columns_of(record, label)
        name = str(record[key]) if key and record[key] is not None else str(number)
        if name not in images:
            if len(images) == limit:
                break
            images[name] = (name, record[image], [], f"{label}[{number}]")
        captions = images[name][2]
        captions.extend(t for t in texts(record[caption]) if t not in captions)
    yield from images.values()
