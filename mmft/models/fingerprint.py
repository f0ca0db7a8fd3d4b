"""Fingerprint of a local model: one hash over all its files, computed in a thread while libraries are imported."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
from pathlib import Path

from ..config.guard.remote_code import trusts_remote_code
from ..system import startup

# Weights come as safetensors only: a pickle from a hub can run code.
CODE = ["*.py"]  # only with --trust-remote-code
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
# Bytes mapped at once. They count as memory of this process, and after each block the thread waits some milliseconds for the
# interpreter lock, which imports hold: with blocks of 32 MB, 3 GB took a second longer.
WINDOW = 1 << 28


def patterns() -> list[str]:
    """Patterns of the file names that are hashed and downloaded."""
    return PATTERNS + CODE if trusts_remote_code() else PATTERNS


def local_revision(folder: Path) -> str:
    """sha256 over the names and contents of a local model's files (`sha256:...`), weights included."""
    folder = folder.resolve()
    thread = _threads.pop(folder, None)
    if thread is not None:
        thread.join()
        if thread.revision is not None and thread.files == _files(folder):
            return thread.revision
    return _hashed(folder)


def read_ahead(path: str) -> None:
    """Start hashing a local model's files in a thread; `local_revision` uses the result unless the files have changed."""
    folder = Path(path).expanduser().resolve()
    if folder.is_dir() and folder not in _threads:
        _threads[folder] = _HashThread(folder)


class _HashThread(threading.Thread):
    """Hashes a folder. revision: the hash of `files` (listed at the start) once the thread has ended; None if reading failed."""

    def __init__(self, folder: Path):
        super().__init__(name="revision", daemon=True)  # a failing command exits without waiting for it
        self.folder, self.files = folder, _files(folder)
        self.revision: str | None = None
        self.start()

    def run(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # `local_revision` reads again and raises it
            self.revision = _hashed(self.folder)


_threads: dict[Path, _HashThread] = {}


def _files(folder: Path) -> list[tuple[Path, int, int]]:
    """(path, size, modification time) of the files that are hashed, sorted by name."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and any(file.match(p) for p in patterns())]
    return [(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


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
    """Import these modules (`startup.load`) while a thread hashes the files of a local `model.path`. Returns whether any was new."""
    return startup.load(*modules, meanwhile=None if model is None else lambda: read_ahead(model))
