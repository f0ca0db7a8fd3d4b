"""Read images from zip and tar files beside a table, one at a time, without unpacking them."""

from __future__ import annotations

import tarfile
import threading
import zipfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from .images import MAX_PIXELS, ImageError, max_bytes
from .wording import shown

SUFFIXES = (".zip", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".7z", ".rar")


@dataclass(frozen=True)
class Member:
    """A file in an archive. offset: where its bytes start in a tar file."""

    archive: Path
    name: str
    size: int
    offset: int = 0


class Archives:
    """The zip and tar files that lie directly in `root`. Their tables of contents are read at the first question."""

    def __init__(self, root: Path | None) -> None:
        files = sorted(root.iterdir()) if root is not None and root.is_dir() else []
        self.paths = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        self.compressed = [f for f in files if f.name.lower().endswith(COMPRESSED) and f.is_file()]
        self.unreadable: list[str] = []  # lines for the user
        self._members: dict[str, list[Member]] | None = None  # by file name without folders
        self._open: dict[Path, zipfile.ZipFile] = {}
        self._lock = threading.Lock()

    def find(self, image: str) -> Member | None:
        """The member that an image path of a row names: `a.png`, `images/a.png` or `images.zip/a.png`; None if none or several do."""
        if not self.paths:
            return None
        path = PurePosixPath(image.replace("\\", "/"))
        if self._members is None:
            self._members = self._contents()
        candidates = []
        for member in self._members.get(path.name, ()):
            inside = PurePosixPath(member.name)
            below = {inside, PurePosixPath(member.archive.name) / inside, PurePosixPath(member.archive.stem) / inside}
            if path in below:
                return member
            if str(inside).endswith(f"/{path}"):
                candidates.append(member)
        return candidates[0] if len(candidates) == 1 else None

    def read(self, member: Member, max_pixels: int = MAX_PIXELS) -> bytes:
        """The bytes of a member. Raises ImageError, without a name, if it is too large or damaged."""
        if member.size > max_bytes(max_pixels):
            raise ImageError("", f"unreadable image: {member.size} bytes, more than {max_bytes(max_pixels)} in all")
        try:
            if member.archive.suffix.lower() == ".tar":
                with member.archive.open("rb") as file:
                    file.seek(member.offset)
                    return file.read(member.size)
            with self._zip(member.archive).open(member.name) as stream:
                return stream.read(member.size + 1)
        except (OSError, RuntimeError, NotImplementedError, EOFError, zipfile.BadZipFile) as error:  # RuntimeError: encrypted
            raise ImageError("", f"unreadable image: {member.archive.name}: {' '.join(str(error).split())}") from None

    def hint(self, image: str) -> str:
        """What to do about a missing image: several archives or folders hold it, or an archive cannot be read one image at a time."""
        members = (self._members or {}).get(PurePosixPath(image.replace("\\", "/")).name, [])
        if len(members) > 1:
            return f"; {members[0].archive.name} holds {members[0].name}, {members[1].archive.name} {members[1].name}: write the folder, too"
        return f"; {self.compressed[0].name} is not read: unpack it, or pack the images as .zip or .tar" if self.compressed else ""

    def close(self) -> None:
        for archive in self._open.values():
            archive.close()

    def _zip(self, path: Path) -> zipfile.ZipFile:
        with self._lock:
            if path not in self._open:
                self._open[path] = zipfile.ZipFile(path)
            return self._open[path]

    def _contents(self) -> dict[str, list[Member]]:
        members: dict[str, list[Member]] = defaultdict(list)
        for path in self.paths:
            try:
                for member in self._list(path):
                    members[PurePosixPath(member.name).name].append(member)
            except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
                self.unreadable.append(f"{path.name}: cannot be read as an archive ({shown(' '.join(str(error).split()))})")
        return members

    def _list(self, path: Path) -> list[Member]:
        if path.suffix.lower() == ".zip":
            return [Member(path, info.filename, info.file_size) for info in self._zip(path).infolist() if not info.is_dir()]
        with tarfile.open(path, "r:") as archive:
            return [Member(path, info.name, info.size, info.offset_data) for info in archive if info.isreg()]
