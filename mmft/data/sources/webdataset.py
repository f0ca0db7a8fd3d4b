"""WebDataset: tar shards in which the files of a sample stand together under one name; images are read where they lie."""

from __future__ import annotations

import glob
import gzip
import itertools
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tarfile import EmptyHeaderError, InvalidHeaderError, TruncatedHeaderError  # type: ignore[attr-defined]  # typeshed lacks them
from typing import IO, Any

from ...common.errors import UserError
from ..images import SUFFIXES
from ..readers import files
from ..sample import BadRow, Row
from ..wording import shown
from .base import ColumnCheck, Stamp, file_stamp
from .columns import ColumnKeys, PositionKey

IMAGES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
TEXTS = ("txt", "text", "caption", "transcript", "cls", "cls2", "index", "id")
PACKED = (".tar.gz", ".tgz")
MOST_TEXT = 64 << 20  # bytes of a text or JSON file in a shard
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(kw_only=True)
class WebDataset(ColumnKeys, PositionKey):
    """path: a shard, a folder of shards, a pattern (`shards/*.tar`) or a range (`shards/{000..127}.tar`).

    A sample is the files whose names are equal up to the first dot: `0001.jpg`, `0001.txt`, `0001.json`. Each is a column named by what stands
    behind that dot: `txt` and `cls` are texts, `json` is an object (`data.columns.text=json.caption` reads a key of it), pictures are images.
    The column `image` is the first picture, `images` all of them, `__key__` the common name. Images of uncompressed shards are not copied: a prepared set names
    their place in the shard.
    """

    path: str

    def shards(self) -> list[Path]:
        """The shards in order. Raises UserError if there are none."""
        found = [shard for path in _ranges(self.path) for shard in _shards(path, self.path)]
        if not found:
            raise UserError(f"data.path={self.path}: no shard (.tar, .tar.gz, .tgz) there; name a shard, a folder of shards or a pattern")
        return found

    def data_root(self) -> Path:
        return Path(self.root).expanduser() if self.root else Path(os.path.commonpath([shard.absolute().parent for shard in self.shards()]))

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(shard) for shard in self.shards()], "root": self.data_root().resolve().as_posix()}

    def read(self) -> Iterator[Row | BadRow]:
        root = self.data_root().absolute()
        check = ColumnCheck(self.columns.check)
        for shard in self.shards():
            for key, record in samples(shard, root):
                where = f"{shard.name}/{shown(key)}"
                if isinstance(record, BadRow):
                    yield record
                    continue
                check(record, where)
                yield from self.columns.rows(record, where, self.prompt, self.image_position, self.captions, self.boxes)
        check.end()


def _ranges(path: str) -> Iterator[str]:
    """`{000..012}` written out, with the zeros of its first number."""
    match = _RANGE.search(path)
    if match is None:
        yield path
        return
    for number in range(int(match[1]), int(match[2]) + 1):
        yield from _ranges(f"{path[: match.start()]}{number:0{len(match[1])}d}{path[match.end() :]}")


def _shards(path: str, given: str) -> list[Path]:
    place = Path(path).expanduser()
    if any(c in path for c in "*?[") and not place.exists():
        return sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
    if not place.exists() and path != given:
        raise UserError(f"data.path={given}: there is no {path}")
    place = files.existing(path)
    return sorted(p for p in place.iterdir() if p.is_file() and p.name.lower().endswith((".tar", *PACKED))) if place.is_dir() else [place]


def samples(shard: Path, root: Path) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """(common name, columns) of each sample in a shard. root: image paths are relative to it.

    Raises UserError for a file that is no tar file, a shard that is cut off, and a name that leads out of the shard.
    """
    packed = _is_packed(shard)
    try:
        # unpacked by gzip, not by tarfile, which neither notices that a file is cut off nor compares the checksum at its end
        with gzip.open(shard) if packed else shard.open("rb") as plain, tarfile.open(fileobj=plain, mode="r|" if packed else "r:", tarinfo=_Member) as archive:
            members = _members(shard, archive)
            for key, group in itertools.groupby(members, key=lambda member: _key(member.name)[0]):
                yield key, _record(shard, root, key, group, archive, packed)
            while packed and plain.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        cut = isinstance(error, EOFError) or "end of data" in reason
        damaged = isinstance(error, (gzip.BadGzipFile, zlib.error))
        what = "is cut off" if cut else f"is damaged ({reason})" if damaged else f"is not a tar file ({reason})"
        raise UserError(f"{shard}: {what}; fetch it again, or leave it out of data.path") from None


def _is_packed(shard: Path) -> bool:
    with shard.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


class _Member(tarfile.TarInfo):
    """A member whose header is there: tarfile ends without a word at a damaged header and where a shard is cut off, as at the empty block at the end of a whole one."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(tarfile)
        except (EmptyHeaderError, InvalidHeaderError, TruncatedHeaderError):
            if tarfile.offset == 0:
                raise  # no tar file at all, which tarfile says itself
            raise EOFError from None


def _members(shard: Path, archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in archive:
        parts = PurePosixPath(member.name).parts
        if ".." in parts or member.name.startswith("/"):
            raise UserError(f"{shard}: holds {shown(member.name)}, a name that leads out of it; such a shard is not read, leave it out of data.path")
        if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
            yield member
        archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every member it has seen: a shard of a million samples would fill the memory


def _key(name: str) -> tuple[str, str]:
    """`a/0001.seg.png` -> (`a/0001`, `seg.png`)."""
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, _, extension = base.partition(".")
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _record(shard: Path, root: Path, key: str, group: Iterator[tarfile.TarInfo], archive: tarfile.TarFile, packed: bool) -> dict[str, Any] | BadRow:
    """The columns of one sample. Every member of it is read, so that the archive stands behind them."""
    record: dict[str, Any] = {"__key__": key, "image": None, "images": []}
    bad: BadRow | None = None
    for member in group:
        extension = _key(member.name)[1]
        kind = extension.rpartition(".")[2]
        if kind in IMAGES:
            value: Any = {"bytes": _bytes(archive, member), "path": None} if packed else _place(shard, root, member)
            record["images"].append(value)
            record["image"] = record["images"][0]
        elif kind in (*TEXTS, "json"):
            try:
                if member.size > MOST_TEXT:
                    raise ValueError(f"has {member.size} bytes, more than {MOST_TEXT}")
                text = _bytes(archive, member).decode("utf-8-sig")
                value = json.loads(text) if kind == "json" else text
            except (ValueError, RecursionError) as error:
                bad = BadRow(f"{shard.name}/{shown(key)}", f"unreadable file: {shown(extension, 40)}: {shown(' '.join(str(error).split()))}", key)
                continue
        else:
            value = None
        record[extension] = value
    return bad or record


def _place(shard: Path, root: Path, member: tarfile.TarInfo) -> str:
    """The image path that mmft.data.images.inside reads."""
    folder = os.path.relpath(shard.absolute(), root)
    return f"{Path(folder).as_posix()}/@{member.offset_data}+{member.size}/{PurePosixPath(member.name).name}"


def _bytes(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file: IO[bytes] | None = archive.extractfile(member)
    data = b"" if file is None else file.read()
    if len(data) < member.size:
        raise EOFError
    return data
