"""Sample the resident memory and the open files of a process ten times a second until it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil


@dataclass
class Watched:
    """memory: MB of resident memory in each sample. files: number of open files in each sample. names: what they are."""

    code: int = 0
    seconds: float = 0.0
    output: str = ""
    memory: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    names: list[list[str]] = field(default_factory=list)

    def tenths(self, warm_up: float = 0.1) -> tuple[float, float, int, int]:
        """(mean memory of the first tenth after warm-up, of the last tenth, median number of open files in the first, in the last).

        The median, because a single sample may fall into the milliseconds in which a picture, /proc/PID/stat or a part of the report is
        read, and at the end of a run more of them are.
        """
        memory, files = (values[int(len(values) * warm_up):] for values in (self.memory, self.files))
        n = max(1, len(memory) // 10)
        return sum(memory[:n]) / n, sum(memory[-n:]) / n, sorted(files[:n])[n // 2], sorted(files[-n:])[n // 2]

    def open_files(self, first: bool = False, warm_up: float = 0.1) -> list[str]:
        """The open files of a sample with the median number, in the last tenth or the first."""
        names = self.names[int(len(self.names) * warm_up):]
        n = max(1, len(names) // 10)
        return sorted(sorted(names[:n] if first else names[-n:], key=len)[n // 2])


def mmft(words: list[str], log: Path, **environment: str) -> Watched:
    """`python -m mmft WORDS` on one core, sampled."""
    seen, started = Watched(), time.time()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **environment}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, "-m", "mmft", *words], stdout=file, stderr=subprocess.STDOUT, env=env)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory, files = watched.memory_info().rss / 2**20, watched.num_fds()
            except psutil.Error:  # it ended between the two samples
                break
            seen.memory.append(memory)
            seen.files.append(files)
            seen.names.append(open_names(process.pid))
            time.sleep(0.1)
        seen.code = process.wait()
    seen.seconds, seen.output = time.time() - started, log.read_text(encoding="utf-8", errors="replace")
    return seen


def open_names(pid: int) -> list[str]:
    """The names of the open files of a process, on Linux."""
    names = []
    for handle in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            names.append(os.readlink(handle))
        except OSError:  # closed in between
            continue
    return names
