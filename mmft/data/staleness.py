"""Find out whether a prepared set still matches its files: compare size and time, and hash the files that differ."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

from ..common.hashing import sha256
from .archives import Archives
from .examine import FileState, file_state
from .image_index import ImageIndex
from .images import HEIF_HINT, inside
from .prepared import ImageFile, PreparedData
from .writer import write_image_files

CHECKED_IMAGES = 20_000  # usable images whose size and time are compared; each image is hashed anyway when it is read
LONGEST_NAME = 255  # characters of a file name
UNUSABLE = "unusable_images.jsonl"


class UnusableImage(TypedDict):
    """One line of unusable_images.jsonl. path: absolute, "" for none. sha256: "" if it could not be read. url: sha256 of its URL."""

    path: str
    sha256: str
    size: int
    mtime_ns: int
    ctime_ns: int
    reason: str
    url: str


def write_unusable(folder: Path, index: ImageIndex) -> None:
    """Write unusable_images.jsonl: the state of the files of dropped rows, so that a later command notices a repair."""
    with (folder / UNUSABLE).open("w", encoding="ascii", newline="\n") as file:
        for r in index.unusable():
            path = r.path if all(len(part) <= LONGEST_NAME for part in r.path.split("/")) else ""
            line: UnusableImage = {"path": path, "sha256": r.sha256, "size": r.size, "mtime_ns": r.mtime_ns, "ctime_ns": r.ctime_ns,
                                   "reason": r.error, "url": r.url}  # fmt: skip
            if path or r.url or HEIF_HINT in r.error:
                file.write(json.dumps(line) + "\n")


def stale(prepared: PreparedData, download: bool) -> str | None:
    """Why the set must be prepared again, for a message; None if it matches its files.

    download: whether images that could not be downloaded are to be tried again. Files whose time changed but not their content
    get their new time recorded, so that they are not hashed again.
    """
    return _changed_archive(prepared) or _repaired(prepared, download) or _changed_image(prepared)


def earlier_downloads(prepared: PreparedData) -> dict[str, Path]:
    """The stored images that were downloaded, by the sha256 of their URL."""
    return {image["url"]: prepared.path / image["path"] for image in prepared.images() if image["url"]}


def _changed_archive(prepared: PreparedData) -> str | None:
    """A change of the archives beside the table, if images are missing or were read from one."""
    before = prepared.manifest["archives"]
    if before is None:
        return None
    root = Path(prepared.manifest["root"] or "")
    now = archive_states(Archives(root))
    name = next((n for n in sorted({*before, *now}) if before.get(n) != now.get(n)), None)
    return None if name is None else f"{root / name} has {'appeared' if name not in before else 'changed' if name in now else 'gone'}"


def archive_states(archives: Archives) -> dict[str, list[int]]:
    """{name: [size, mtime_ns]} of archives, for the manifest."""
    return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in archives.paths}


def _repaired(prepared: PreparedData, download: bool) -> str | None:
    appeared, changed, downloads, readable = [], [], 0, 0
    for image in _unusable_images(prepared):
        if image["url"]:
            downloads += download
        elif HEIF_HINT in image["reason"] and importlib.util.find_spec("pillow_heif") is not None:
            readable += 1
        elif image["path"] and (state := file_state(Path(image["path"]))) != _state(image) and state["size"] >= 0:
            if image["size"] < 0:
                appeared.append(image["path"])
            elif not image["sha256"] or _hash(Path(image["path"])) != image["sha256"]:
                changed.append(image["path"])
    if appeared:
        return _sentence(appeared, "was missing and is there now", "were missing and are there now")
    if changed:
        return _sentence(changed, "could not be used and has changed", "could not be used and have changed")
    if readable:
        return f"{readable} HEIC image{'s' * (readable > 1)} can be read now"
    return f"{downloads} image{'s' * (downloads > 1)} could not be downloaded" if downloads else None


def _sentence(paths: list[str], one: str, several: str) -> str:
    return f"{paths[0]} {one}" if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more {several}"


def _changed_image(prepared: PreparedData) -> str | None:
    """The name of a usable image file that is gone or has changed. Checks 20,000 evenly spaced files if there are more."""
    step = max(1, prepared.manifest["images"] // CHECKED_IMAGES)
    touched: dict[int, int] = {}  # number of an image with a new time but its old content -> the new time
    for number, image in enumerate(prepared.images()):
        if number % step:
            continue
        path = (prepared.path if image["stored"] else Path(prepared.manifest["root"] or "")) / image["path"]
        state = file_state(path)
        if state["size"] < 0:
            return f"{path} is gone"
        if state["size"] != image["bytes"]:
            return f"{path} has changed"
        if state["mtime_ns"] != image["mtime_ns"]:
            if _hash(path) != image["sha256"]:
                return f"{path} has changed"
            touched[number] = state["mtime_ns"]
    if touched:
        _record_times(prepared, touched)
    return None


def _record_times(prepared: PreparedData, times: dict[int, int]) -> None:
    def images() -> Iterator[ImageFile]:
        for number, image in enumerate(prepared.images()):
            yield {**image, "mtime_ns": times.get(number, image["mtime_ns"])}

    target = prepared.path / "images.arrow"
    write_image_files(target.with_suffix(".tmp"), images())
    os.replace(target.with_suffix(".tmp"), target)


def _hash(path: Path) -> str | None:
    try:
        if (place := inside(path)) is not None:
            return hashlib.sha256(place.read()).hexdigest()
        return sha256(path) if path.is_file() else None
    except OSError:
        return None


def _state(image: UnusableImage) -> FileState:
    return {"size": image["size"], "mtime_ns": image["mtime_ns"], "ctime_ns": image["ctime_ns"]}


def _unusable_images(prepared: PreparedData) -> Iterator[UnusableImage]:
    with (prepared.path / UNUSABLE).open(encoding="ascii") as file:
        for line in file:
            yield json.loads(line)
