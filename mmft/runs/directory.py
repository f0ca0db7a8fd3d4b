"""Run: a run directory, created atomically and written file by file; the interface between verbs."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..system.distributed import is_main

UNFINISHED = (".lock", ".snapshot.yaml.")  # files of a run directory whose creation was interrupted
MINIMUM_FREE = 64 * 1024 * 1024  # bytes, for the smallest run; training/disk_space.py computes what a training needs


class Run:
    """A run directory. `Run.create` creates a new one; `Run(path)` stands for an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.started = time.time()
        self.writes = is_main()  # in distributed training only the main process writes

    @classmethod
    def create(cls, output_dir: str, words: list[str], run_dir: str | None = None) -> Run:
        """Create a new, empty directory; two processes never share one. Raises UserError if `run_dir` exists."""
        parent = Path(run_dir).parent if run_dir else Path(output_dir)
        try:
            parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(parent).free
            if free < MINIMUM_FREE:
                raise UserError(f"{parent}: only {free >> 20} MB free; a run needs at least {MINIMUM_FREE >> 20} MB (output_dir=... to write elsewhere)")
            if run_dir:
                return cls(_make(Path(run_dir), reuse_unfinished=True))
            stem = "_".join([datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S"), *(plain_name(w) for w in words if w)])
            for n in range(1, 1000):
                try:
                    return cls(_make(parent / (stem if n == 1 else f"{stem}-{n}")))
                except FileExistsError:
                    continue
        except OSError as error:
            if isinstance(error, FileExistsError) and run_dir and Path(run_dir).exists():
                raise UserError(f"run_dir={run_dir}: exists already; a run never writes over another (choose a new run_dir, or drop the key)") from None
            raise UserError(f"{parent}: a run directory cannot be created: {error.strerror or error}") from None
        raise UserError(f"{parent}: no free name for a run directory")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def seconds(self) -> float:
        return time.time() - self.started

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory's lock inside the block. Raises UserError if another process trains into it."""
        if not self.writes:
            yield
            return
        from filelock import FileLock, Timeout

        lock = FileLock(self.path / ".lock")  # released by the system if this process dies
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"run={self.path}: is being trained by another process now; wait for it to end") from None
        try:
            yield
        finally:
            lock.release()
            (self.path / ".lock").unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> Path:
        """Write a file atomically: it is complete or absent."""
        path = self.path / name
        if not self.writes:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = path.with_name(f".{path.name}.{os.getpid()}")
        with staging.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        return path

    def write_json(self, name: str, value: Mapping[str, Any]) -> Path:
        """Write an object; NaN and infinity raise ValueError."""
        return self.write_text(name, json.dumps(value, ensure_ascii=False, indent=2, default=str, allow_nan=False) + "\n")

    def write_lines(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write rows as JSON Lines."""
        return self.write_text(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def append_line(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one row to a JSON Lines file; it is short enough to be written in one piece."""
        path = self.path / name
        if not self.writes:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def record(self, verb: str, overrides: list[str], wrote: list[Path]) -> None:
        """Add to verbs.jsonl what a verb wrote: paths below this directory are relative to it, others absolute."""
        home = self.path.resolve()
        names = [p.relative_to(home).as_posix() if p.is_relative_to(home) else p.as_posix() for p in (Path(w).resolve() for w in wrote)]
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self.append_line("verbs.jsonl", {"verb": verb, "time": now, "overrides": list(overrides), "wrote": names})

    def read_json(self, name: str) -> Any:
        """The content of a JSON file. Raises UserError if it is missing or not valid."""
        path = self.path / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: there is no such file; is this the directory of a finished run?") from None
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error})") from None


def _make(path: Path, reuse_unfinished: bool = False) -> Path:
    """Create a directory. With `reuse_unfinished`, accept one that a killed process created and has not filled."""
    try:
        path.mkdir()  # fails if another process was first
    except FileExistsError:
        if not (reuse_unfinished and path.is_dir() and all(p.name.startswith(UNFINISHED) for p in path.iterdir())):
            raise
    return path


def plain_name(word: str) -> str:
    """A word as part of a file name that every file system accepts."""
    return re.sub(r"[^\w.-]+", "-", word).strip("-. ") or "run"
