"""Check, hash and copy images during preparation; an SQLite file holds the results, so that memory use does not grow."""

from __future__ import annotations

import hashlib
import os
import re
import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.guard.secrets import redact
from .download import Download, is_url
from .images import ImageError, decode, read_image

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
RECENT = 4096  # image records cached in memory: rows of one image usually stand together


@dataclass(frozen=True)
class ImageRecord:
    """One image, or in `error` the reason why it cannot be used.

    path: relative to the data root, or to the prepared directory if `stored` (copied into it).
    content: a number that images with the same bytes share.
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


def locate(image: str, root: Path | None) -> tuple[Path, str]:
    """The file that an image path of a row names, and its posix path below `root`. Raises ImageError without a name."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/?/?", image) and not re.match(r"[A-Za-z]:[\\/]", image):
        raise ImageError("", f"image is a URL: {redact(image[:200])}; download it and name the file, or mmft prepare with data.download.hosts=[HOST]")
    if root is None:
        raise ImageError("", f"missing image: {image} is a path and this source has no data root; set data.root")
    name = image if os.sep == "\\" or "\\" not in image or (root / image).exists() else image.replace("\\", "/")
    try:
        path = Path(os.path.normpath(root / name))
        real, real_root = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    except ValueError:
        raise ImageError("", f"missing image: {image!r} is not a file name") from None
    allowed = [real_root]
    for folder in (root, *root.parents):  # the snapshots of a hub's cache link to files beside them
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(a) for a in allowed):
        raise ImageError("", f"image outside the data root: {image} is not below {root.as_posix()}; set data.root to a folder that holds it")
    base = next((b for b in (Path(os.path.normpath(root)), real_root) if path.is_relative_to(b)), None)
    relative = path.relative_to(base) if base is not None else real.relative_to(real_root)
    return path, relative.as_posix()


def examine(image: str | bytes, root: Path | None, store: Path | None, download: Download | None = None) -> ImageRecord:
    """Read (or download), hash and decode one image; with `store`, also copy it into that folder, named by its hash.

    Runs in a worker thread. A fault of the image is returned in the record's `error`; raises OSError if the copy fails.
    """
    mtime = 0
    try:
        if isinstance(image, bytes):
            data, relative = image, ""
        elif download is not None and is_url(image):
            data, relative = download.fetch(image), ""
        else:
            path, relative = locate(image, root)
            data = read_image(path, "")
            mtime = path.stat().st_mtime_ns
        picture, kind = decode(data)
    except ImageError as error:
        shown = "" if isinstance(image, bytes) else redact(image)
        named = error.reason if shown in error.reason else error.reason.replace(": ", f": {shown}: ", 1)
        return ImageRecord(error=named)
    sha256 = hashlib.sha256(data).hexdigest()
    if store is not None:
        relative = f"images/{sha256[:2]}/{sha256}.{EXTENSIONS.get(kind, kind.lower())}"
        target = store / relative
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        mtime = target.stat().st_mtime_ns
    width, height = picture.size
    return ImageRecord(relative, sha256, len(data), width, height, mtime, store is not None)


class ImageIndex:
    """Image records by key, and the row ids in use, in the SQLite file `path`. Used by one thread only."""

    def __init__(self, path: Path):
        self._db = sqlite3.connect(path, isolation_level=None)
        # the file is deleted after the preparation, so it need not survive a crash
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-6000", "locking_mode=EXCLUSIVE"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.execute("CREATE TABLE images (number INTEGER PRIMARY KEY, key TEXT UNIQUE, path, sha256, size, width, height, mtime_ns, stored, error, content)")
        self._db.execute("CREATE TABLE contents (number INTEGER PRIMARY KEY, sha256 TEXT UNIQUE)")
        self._db.execute("CREATE TABLE ids (id TEXT PRIMARY KEY, seen INTEGER) WITHOUT ROWID")
        self._db.execute("BEGIN")
        self._recent: OrderedDict[str, ImageRecord] = OrderedDict()
        self.n_images = 0
        self.n_contents = 0

    def close(self) -> None:
        self._db.close()

    def get(self, key: str) -> ImageRecord | None:
        record = self._recent.get(key)
        if record is None:
            row = self._db.execute("SELECT path, sha256, size, width, height, mtime_ns, stored, error, number, content FROM images WHERE key = ?", (key,)).fetchone()
            record = ImageRecord(*row) if row else None
        if record is not None:
            self._remember(key, record)
        return record

    def add(self, key: str, r: ImageRecord) -> ImageRecord:
        content = -1
        if not r.error:
            found = self._db.execute("SELECT number FROM contents WHERE sha256 = ?", (r.sha256,)).fetchone()
            content = found[0] if found else self.n_contents
            if not found:
                self._db.execute("INSERT INTO contents VALUES (?, ?)", (content, r.sha256))
                self.n_contents += 1
        record = ImageRecord(r.path, r.sha256, r.size, r.width, r.height, r.mtime_ns, r.stored, r.error, self.n_images, content)
        self._db.execute("INSERT INTO images VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (
            record.number, key, r.path, r.sha256, r.size, r.width, r.height, r.mtime_ns, r.stored, r.error, content))
        self.n_images += 1
        self._remember(key, record)
        return record

    def _remember(self, key: str, record: ImageRecord) -> None:
        self._recent[key] = record
        self._recent.move_to_end(key)
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)

    def unique_id(self, wanted: str) -> str:
        """`wanted`, or `wanted#2`, `wanted#3`... if earlier rows have it."""
        name = wanted
        while True:
            try:
                self._db.execute("INSERT INTO ids VALUES (?, 1)", (name,))
                return name
            except sqlite3.IntegrityError:
                self._db.execute("UPDATE ids SET seen = seen + 1 WHERE id = ?", (wanted,))
                seen = self._db.execute("SELECT seen FROM ids WHERE id = ?", (wanted,)).fetchone()[0]
                name = f"{wanted}#{seen}"

    def digests(self) -> Iterator[bytes]:
        """The sha256 of each content, in the order of content numbers."""
        for (sha256,) in self._db.execute("SELECT sha256 FROM contents ORDER BY number"):
            yield bytes.fromhex(sha256)

    def images(self) -> Iterator[ImageRecord]:
        """The usable images, one record for each key."""
        columns = "path, sha256, size, width, height, mtime_ns, stored, error, number, content"
        for row in self._db.execute(f"SELECT {columns} FROM images WHERE error = '' ORDER BY number"):
            yield ImageRecord(*row)
