"""Examine images during preparation: find, read or download, hash, decode and copy them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from ..config.guard.secrets import redact
from .archives import Archives, Member
from .download import Download, RefusedError, is_url
from .image_index import ImageRecord
from .images import MAX_PIXELS, ImageError, decode, read_image
from .wording import shorten_words, shown

EXTENSIONS = {"HEIF": "heic", "JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


def locate(image: str, root: Path | None, boundary: Path | None = None) -> tuple[Path, str]:
    """The file that an image path of a row names, and its posix path relative to `root`; it must lie in `boundary` (None: in root).

    Raises ImageError without a name.
    """
    place = candidate(image, root)
    if (place is None or not _is_file(place)) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", image):
        raise ImageError("", f"image is a URL: {shown(redact(image))}; download it and name the file, or mmft prepare with data.download.hosts=[HOST]")
    if root is None:
        raise ImageError("", f"missing image: {shown(image)} is a path and this source has no data root; set data.root")
    if place is None:
        raise ImageError("", f"missing image: {shown(image)!r} is not a file name")
    real, real_root = Path(os.path.realpath(place)), Path(os.path.realpath(root))
    allowed = [real_root, Path(os.path.realpath(boundary or root))]
    for folder in (root, *root.parents):  # the snapshots of a hub's cache link to files beside them
        if folder.parent.name == "snapshots":
            allowed.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(a) for a in allowed):
        raise ImageError("", f"image outside the data root: {shown(image)} is not below {root.as_posix()}; run mmft in a folder that holds both, or set data.root to a folder that holds it")
    base = next((b for b in (Path(os.path.normpath(root)), real_root) if place.is_relative_to(b)), None)
    return place, Path(os.path.relpath(place, base) if base is not None else os.path.relpath(real, real_root)).as_posix()


def candidate(image: str, root: Path | None) -> Path | None:
    """The path below `root` that `image` would name, whether it exists or not; None if it is not a possible file name."""
    if root is None:
        return None
    try:
        name = image if os.sep == "\\" or "\\" not in image or (root / image).exists() else image.replace("\\", "/")
        place = Path(os.path.normpath(root / name))
        os.path.realpath(place)  # raises ValueError for a name with a null
        return place
    except ValueError:
        return None
    except OSError:  # too long
        return Path(os.path.normpath(root / image))


@dataclass(frozen=True)
class Examiner:
    """Reads, hashes and decodes images in worker threads.

    root: of relative image paths. boundary: the folder that image files must lie in. store: the folder into which images are copied that are no files below `root`.
    earlier: stored images of an earlier preparation by the sha256 of their URL; they are not downloaded again.
    """

    root: Path | None
    boundary: Path | None
    store: Path
    archives: Archives
    download: Download | None = None
    max_pixels: int = MAX_PIXELS
    earlier: Mapping[str, Path] = field(default_factory=dict)

    def examine(self, image: str | bytes, copy: bool) -> ImageRecord:
        """The record of one image; with `copy`, it is also written into `store`, named by its hash.

        A fault of the image is returned in the record's `error`. Raises OSError if the copy cannot be written.
        """
        path: Path | None = None
        data, relative, mtime, url = b"", "", 0, ""
        try:
            if isinstance(image, bytes):
                data = image
            elif self.download is not None and is_url(image):
                url = hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()
                data = self._downloaded(image, url, self.download)
            elif (member := self.archived(image)) is not None:
                data = self.archives.read(member, self.max_pixels)
            else:
                path = candidate(image, self.root)
                path, relative = locate(image, self.root, self.boundary)
                data = read_image(path, "", self.max_pixels)
                mtime = path.stat().st_mtime_ns
            picture, kind = decode(data, "", self.max_pixels)
        except ImageError as error:
            url = "" if isinstance(error, RefusedError) else url  # it would be refused again
            name = "" if isinstance(image, bytes) else shown(redact(image))
            reason = shorten_words(error.reason if name in error.reason else error.reason.replace(": ", f": {name}: ", 1))
            if reason.startswith("missing image"):
                reason += self.archives.hint()
            return ImageRecord(error=reason, path=str(path or ""), url=url, sha256=hashlib.sha256(data).hexdigest() if data else "", **file_state(path))
        sha256 = hashlib.sha256(data).hexdigest()
        if copy:
            relative = f"images/{sha256[:2]}/{sha256}.{EXTENSIONS.get(kind, kind.lower())}"
            target = self.store / relative
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            mtime = target.stat().st_mtime_ns
        width, height = picture.size
        return ImageRecord(relative, sha256, len(data), width, height, mtime, stored=copy, url=url)

    def archived(self, image: str) -> Member | None:
        """The member of an archive that an image path names, unless there is a file of that name."""
        if not self.archives.paths:
            return None
        place = candidate(image, self.root)
        return None if place is None or _is_file(place) else self.archives.find(image)

    def _downloaded(self, image: str, url: str, download: Download) -> bytes:
        if url in self.earlier:
            data = self.earlier[url].read_bytes()
            if self.earlier[url].name.startswith(hashlib.sha256(data).hexdigest()):
                return data
        return download.fetch(image)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # the name is too long
        return False


class FileState(TypedDict):
    """What changes when a file is written, replaced, or made readable; -1 for a file that does not exist."""

    size: int
    mtime_ns: int
    ctime_ns: int


def file_state(path: Path | None) -> FileState:
    try:
        info = path.stat() if path is not None else None
    except (OSError, ValueError):
        info = None
    if info is None:
        return {"size": -1, "mtime_ns": -1, "ctime_ns": -1}
    return {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "ctime_ns": info.st_ctime_ns}
