"""Examine images during preparation: find, read or download, hash, decode and copy them."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypedDict

from ..config.guard.secrets import redact
from .archives import Archives, Member
from .download import Download, RefusedError, is_url
from .image_index import ImageRecord
from .images import MAX_PIXELS, ImageError, PlacedBytes, decode, inside, read_image
from .near import ENOUGH, look
from .wording import shorten_words, shown

EXTENSIONS = {"HEIF": "heic", "JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}


def allowed_folders(root: Path | None, boundary: Path | None) -> list[Path]:
    """The real folders that image files may lie in: `root`, `boundary`, and the files beside the snapshots of a hub's cache."""
    if root is None:
        return []
    folders = [Path(os.path.realpath(root)), Path(os.path.realpath(boundary or root))]
    return folders + [f.parent.parent / "blobs" for f in (root, *root.parents) if f.parent.name == "snapshots"]


def locate(image: str, root: Path | None, allowed: Sequence[Path], folders: dict[str, str]) -> tuple[Path, str]:
    """The file that an image path of a row names, and its posix path relative to `root`; it must lie in a folder of `allowed`.

    folders: real paths of folders, which are kept from one image to the next. Raises ImageError without a name.
    """
    place = candidate(image, root)
    if (place is None or not _is_file(place)) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", image):
        raise ImageError("", f"image is a URL: {shown(redact(image))}; download it and name the file, or mmft prepare with data.download.hosts=[HOST]")
    if root is None:
        raise ImageError("", f"missing image: {shown(image)} is a path and this source has no data root; set data.root")
    if place is None:
        raise ImageError("", f"missing image: {shown(image)!r} is not a file name")
    real = Path(_real_path(str(place), folders))
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise ImageError("", f"image outside the data root: {shown(image)} is not below {root.as_posix()}; run mmft in a folder that holds both,"
                         " or set data.root to a folder that holds it")  # fmt: skip
    base = next((b for b in (Path(os.path.normpath(root)), allowed[0]) if place.is_relative_to(b)), None)
    return place, (place.relative_to(base) if base is not None else Path(os.path.relpath(real, allowed[0]))).as_posix()


def _real_path(place: str, folders: dict[str, str]) -> str:
    """os.path.realpath, which looks at every folder of the path, of a file whose folder may be known."""
    folder, name = os.path.split(place)
    if os.path.islink(place):
        return os.path.realpath(place)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    return os.path.join(folders[folder], name)


def candidate(image: str, root: Path | None) -> Path | None:
    """The path below `root` that `image` would name, whether it exists or not; None if it is not a possible file name."""
    if root is None or "\0" in image or not image.isprintable() and any("\ud800" <= c <= "\udfff" for c in image):
        return None
    name = image if os.sep == "\\" or "\\" not in image or _is_file(root / image) else image.replace("\\", "/")
    return Path(os.path.normpath(root / name))


@dataclass(frozen=True)
class Examiner:
    """Reads, hashes and decodes images in worker threads.

    root: of relative image paths. boundary: the folder that image files must lie in. store: the folder into which images are copied that are no files below `root`.
    earlier: stored images of an earlier preparation by the sha256 of their URL; they are not downloaded again. looks: whether it is noted what
    images look like.
    """

    root: Path | None
    boundary: Path | None
    store: Path
    archives: Archives
    download: Download | None = None
    max_pixels: int = MAX_PIXELS
    earlier: Mapping[str, Path] = field(default_factory=dict)
    looks: bool = True
    _folders: dict[str, str] = field(default_factory=dict)  # see locate
    _files: dict[Path, str | None] = field(default_factory=dict)  # file with images in it -> its path below `root`

    @cached_property
    def allowed(self) -> list[Path]:
        return allowed_folders(self.root, self.boundary)

    def examine(self, image: str | bytes, copy: bool) -> ImageRecord:
        """The record of one image; with `copy`, it is also written into `store`, named by its hash.

        A fault of the image is returned in the record's `error`. Raises OSError if the copy cannot be written.
        """
        path: Path | None = None
        data, relative, mtime, url = b"", "", 0, ""
        try:
            if isinstance(image, bytes):
                data = image
                if not copy:
                    relative = self.place(image) or ""
                    path = Path(self.root or "", relative)
                    mtime = file_state(path)["mtime_ns"]
            elif self.download is not None and is_url(image):
                url = hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()
                data = self._downloaded(image, url, self.download)
            elif (member := self.archived(image)) is not None:
                data = self.archives.read(member, self.max_pixels)
            else:
                path = candidate(image, self.root)
                path, relative = locate(image, self.root, self.allowed, self._folders)
                data = read_image(path, "", self.max_pixels)
                mtime = file_state(path)["mtime_ns"]
            picture, kind, (width, height) = decode(data, "", self.max_pixels, ENOUGH if self.looks else 1)
        except ImageError as error:
            url = "" if isinstance(error, RefusedError) else url  # it would be refused again
            name = "" if isinstance(image, bytes) else shown(redact(image))
            reason = shorten_words(error.reason if name in error.reason else error.reason.replace(": ", f": {name}: ", 1))
            if reason.startswith("missing image"):
                reason += self.archives.hint(str(image))
            return ImageRecord(error=reason, path=str(path or ""), url=url, sha256=hashlib.sha256(data).hexdigest() if data else "", **file_state(path))
        sha256 = hashlib.sha256(data).hexdigest()
        if copy:
            relative = f"images/{sha256[:2]}/{sha256}.{EXTENSIONS.get(kind, kind.lower())}"
            target = self.store / relative
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
            mtime = target.stat().st_mtime_ns
        return ImageRecord(relative, sha256, len(data), width, height, mtime, stored=copy, url=url, look=look(picture) if self.looks else b"")

    def place(self, image: bytes) -> str | None:
        """The path below `root` under which `inside` finds an image that came as bytes; None if it lies in no file there."""
        if self.root is None or not isinstance(image, PlacedBytes):
            return None
        file = image.inside.archive
        if file not in self._files:
            below = Path(os.path.abspath(file)).is_relative_to(os.path.abspath(self.root)) and Path(os.path.realpath(file)).is_relative_to(os.path.realpath(self.root))
            self._files[file] = Path(os.path.relpath(file, self.root)).as_posix() if below else None
        name = self._files[file]
        return None if name is None else f"{name}/{image.inside.place}/{image.name}"

    def archived(self, image: str) -> Member | None:
        """The member of an archive that an image path names, unless there is a file of that name."""
        if not self.archives.paths:
            return None
        place = candidate(image, self.root)
        return None if place is None or _is_file(place) or inside(place) else self.archives.find(image)

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
    """The state of a file; of an image inside a tar file its size and the times of the archive."""
    try:
        place = inside(path) if path is not None else None
        info = None if path is None else place.archive.stat() if place else path.stat()
    except (OSError, ValueError):
        info = None
    if info is None:
        return {"size": -1, "mtime_ns": -1, "ctime_ns": -1}
    if place is not None:
        return {"size": place.size, "mtime_ns": info.st_mtime_ns, "ctime_ns": info.st_ctime_ns}
    return {"size": info.st_size, "mtime_ns": info.st_mtime_ns, "ctime_ns": info.st_ctime_ns}
