"""ImageIndex: what is known about images, ids and references during a preparation, in an SQLite file, so that memory use does not grow."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from .near import LOOK

_COLUMNS = "path, sha256, size, width, height, mtime_ns, stored, error, number, content, ctime_ns, url"
RECENT = 4096  # image records cached in memory: rows of one image usually stand together


@dataclass(frozen=True)
class ImageRecord:
    """One image, or in `error` the reason why it cannot be used.

    path: relative to the data root, or to the prepared directory if `stored` (copied into it); absolute if it cannot be used.
    url: the sha256 of the URL it was downloaded from. content: a number that images with the same bytes share. look: see near.look, known
    only when the image was examined.
    """

    path: str = ""
    sha256: str = ""
    size: int = 0
    width: int = 0
    height: int = 0
    mtime_ns: int = 0
    stored: bool = False
    error: str = ""
    number: int = -1
    content: int = -1
    ctime_ns: int = 0
    url: str = ""
    look: bytes = b""


class ImageIndex:
    """Image records by key, and the row ids in use, in the SQLite file `path`; beside it a file of what images look like. Used by one thread only."""

    def __init__(self, path: Path):
        self._db = sqlite3.connect(path, isolation_level=None)
        # the file is deleted after the preparation, so it need not survive a crash
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-2000", "locking_mode=EXCLUSIVE"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE images (number INTEGER PRIMARY KEY, key TEXT UNIQUE, path, sha256, size, width, height, mtime_ns, stored, error, content, ctime_ns, url)")
        self._db.execute("CREATE TABLE contents (number INTEGER PRIMARY KEY, sha256 TEXT UNIQUE)")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, seen INTEGER, batch INTEGER) WITHOUT ROWID")
        self._db.execute("CREATE TABLE shared (key INTEGER, reference TEXT, UNIQUE (key, reference))")
        self._db.execute("BEGIN")
        self.looks_file = path.with_suffix(".looks")
        self._looks = self.looks_file.open("wb")
        self._recent: OrderedDict[str, ImageRecord] = OrderedDict()
        self.n_images = 0
        self.n_contents = 0
        self._batch = 0  # number of the last rows whose ids were entered at once
        self._ids_differ = True  # whether the last rows all kept their ids, so that the next ones are entered at once

    def close(self) -> None:
        self._looks.close()
        self._db.close()

    def get(self, key: str) -> ImageRecord | None:
        record = self._recent.get(key)
        if record is not None:
            self._recent.move_to_end(key)
        else:
            row = self._db.execute(f"SELECT {_COLUMNS} FROM images WHERE key = ?", (key,)).fetchone()
            record = ImageRecord(*row) if row else None
            if record is not None:
                self._remember(key, record)
        return record

    def add(self, key: str, r: ImageRecord) -> ImageRecord:
        content = -1
        if not r.error:
            if self._db.execute("INSERT OR IGNORE INTO contents VALUES (?, ?)", (self.n_contents, r.sha256)).rowcount:
                content = self.n_contents
                self._looks.write(r.look or bytes(LOOK.itemsize))
                self.n_contents += 1
            else:
                content = self._db.execute("SELECT number FROM contents WHERE sha256 = ?", (r.sha256,)).fetchone()[0]
        record = replace(r, number=self.n_images, content=content, look=b"")
        self._db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
            record.number, key, r.path, r.sha256, r.size, r.width, r.height, r.mtime_ns, r.stored, r.error, content, r.ctime_ns, r.url))
        self.n_images += 1
        self._remember(key, record)
        return record

    def _remember(self, key: str, record: ImageRecord) -> None:
        self._recent[key] = record
        self._recent.move_to_end(key)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def unique_ids(self, wanted: list[str]) -> list[str]:
        """The ids of some rows: `a`, or `a#2`, `a#3`... if earlier rows have it."""
        if self._ids_differ and len(set(wanted)) == len(wanted):
            self._batch += 1
            if self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?, 1, ?)", ((id, self._batch) for id in wanted)).rowcount == len(wanted):
                return wanted
            self._db.executemany("DELETE FROM ids WHERE id = ? AND batch = ?", ((id, self._batch) for id in wanted))
        ids = [self._unique_id(id) for id in wanted]
        self._ids_differ = ids == wanted
        return ids

    def _unique_id(self, wanted: str) -> str:
        id = wanted
        while True:
            try:
                self._db.execute("INSERT INTO ids VALUES (?, 1, 0)", (id,))
                return id
            except sqlite3.IntegrityError:
                self._db.execute("UPDATE ids SET seen = seen + 1 WHERE id = ?", (wanted,))
                seen = self._db.execute("SELECT seen FROM ids WHERE id = ?", (wanted,)).fetchone()[0]
                id = f"{wanted}#{seen}"

    def forget_ids(self) -> None:
        """No more rows come: free what is cached of their ids."""
        for statement in ("COMMIT", "PRAGMA shrink_memory", "BEGIN"):  # what is not committed is not freed
            self._db.execute(statement)

    def digests(self) -> Iterator[bytes]:
        """The sha256 of each content, in the order of content numbers."""
        for (sha256,) in self._db.execute("SELECT sha256 FROM contents ORDER BY number"):
            yield bytes.fromhex(sha256)

    def looks(self) -> np.ndarray:
        """(contents,) LOOK, in the order of content numbers: a mapped file."""
        self._looks.flush()
        return np.memmap(self.looks_file, LOOK, "r") if self.n_contents else np.zeros(0, LOOK)

    def first_of(self, contents: Iterable[int]) -> dict[int, ImageRecord]:
        """content -> the record of its first image."""
        wanted, found = set(contents), dict[int, ImageRecord]()
        for record in self.images() if wanted else ():
            if record.content in wanted:
                found.setdefault(record.content, record)
        return found

    def images(self) -> Iterator[ImageRecord]:
        """The usable images, one record for each key."""
        return self._records("error = ''")

    def unusable(self) -> Iterator[ImageRecord]:
        """The images that cannot be used."""
        return self._records("error != ''")

    def _records(self, condition: str) -> Iterator[ImageRecord]:
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM images WHERE {condition} ORDER BY number"):
            yield ImageRecord(*row)

    # -- references that rows with the same images and prompt share --

    def add_references(self, key: int, references: Iterable[str]) -> int:
        """Of a key of images and prompt; a reference that exists is kept once. Returns how many were new."""
        return max(0, self._db.executemany("INSERT OR IGNORE INTO shared VALUES (?, ?)", ((key, text) for text in references)).rowcount)

    def references(self, key: int, most: int) -> list[str]:
        """The first `most` references of a key."""
        return [text for (text,) in self._db.execute("SELECT reference FROM shared WHERE key = ? ORDER BY rowid LIMIT ?", (key, most))]
