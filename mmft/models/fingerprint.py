"""What a local model's files are: one hash of all of them, which can be begun while libraries are imported."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
from pathlib import Path

from ..config.guard.targets import trusts_remote_code
from ..system import startup

# Weights come as safetensors only: a pickle from a hub can run code.
CODE = ["*.py"]  # only where the command trusts it
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
# Bytes that are mapped at once. They count as this process's memory meanwhile; and after each the thread waits some milliseconds
# for the interpreter, which imports keep busy: read in blocks of 32 MB, 3 GB took a second longer.
WINDOW = 1 << 28


def patterns() -> list[str]:
    """The names of the files that count, and that are downloaded."""
    return PATTERNS + CODE if trusts_remote_code() else PATTERNS


def local_revision(folder: Path) -> str:
    """sha256 over the names and contents of a local model's files (`sha256:...`); weights count whole."""
    folder = folder.resolve()
    begun = _begun.pop(folder, None)
    if begun is not None:
        begun.join()
        if begun.revision is not None and begun.files == _files(folder):
            return begun.revision
    return _hashed(folder)


def read_ahead(path: str) -> None:
    """Begin to hash a local model's files in a thread; `local_revision` takes what it found, if they have not changed since."""
    folder = Path(path).expanduser().resolve()
    if folder.is_dir() and folder not in _begun:
        _begun[folder] = _Ahead(folder)


class _Ahead(threading.Thread):
    """revision: once it has ended, that of `files` as they were at its beginning; None where they could not be read."""

    def __init__(self, folder: Path):
        super().__init__(name="revision", daemon=True)  # a command that ends with a mistake does not wait for it
        self.folder, self.files = folder, _files(folder)
        self.revision: str | None = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # who asks for the revision meets it, too
            self.revision = _hashed(self.folder)


_begun: dict[Path, _Ahead] = {}


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """(path, size, time of its last change) of those that count, by name."""
    found = [file for file in sorted(folder.iterdir()) if file.is_file() and any(file.match(p) for p in patterns())]
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in found]


def _hashed(folder: Path) -> str:
    digest = hashlib.sha256()
    for path, size, _ in _files(folder):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            for start in range(0, size, WINDOW):
                with mmap.mmap(file.fileno(), min(WINDOW, size - start), access=mmap.ACCESS_READ, offset=start) as contents:
                    digest.update(contents)
    return f"sha256:{digest.hexdigest()}"


def import_while_hashing(*modules: str, model: str | None) -> bool:
    """`startup.load` of these modules, while the files of a local `model.path` are hashed in a thread."""
    return startup.load(*modules, meanwhile=None if model is None else lambda: read_ahead(model))
