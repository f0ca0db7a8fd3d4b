"""One contender as a process: its wall time, its peak memory, and how fast this machine multiplies at that moment."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .commands import ROOT, Command

EVERY = 0.1  # seconds between looks at a process's memory
AT_MOST = 0.01  # of the time goes into looking
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "WANDB_MODE": "offline"}


@dataclass
class Timed:
    """What one process took. loop and cache in seconds as the contender reports them, wall and memory (MB) from outside."""

    name: str
    wall: float
    memory: float
    loop: float = 0.0
    cache: float = 0.0
    losses: list[list[float]] = field(default_factory=list)  # of each run in it, step by step
    times: dict[str, float] = field(default_factory=dict)  # mmft's own account of the parts


def run(command: Command, python: str = sys.executable, threads: int | None = None, timeout: float = 3600) -> Timed:
    """Errors raised: RuntimeError with the end of its output when the process fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MMFT_PACKAGES")} | OFFLINE
    if threads:
        env |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command.out.mkdir(parents=True, exist_ok=True)
    log = command.out / "log.txt"
    with log.open("w", encoding="utf-8") as file:
        started = time.perf_counter()
        process = subprocess.Popen([python, *command.words], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)
        watch = Memory(process.pid)
        try:
            code = process.wait(timeout)
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            watch.stop()
        wall = time.perf_counter() - started
    if code:
        raise RuntimeError(f"{command.name} ended with {code}; {log}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
    timed = Timed(command.name, wall, watch.peak / 2**20)
    return _mmft(command, timed) if command.mmft else _script(command, timed)


def _script(command: Command, timed: Timed) -> Timed:
    result = json.loads((command.out / "result.json").read_text(encoding="utf-8"))
    timed.loop, timed.cache, timed.losses = result["loop"], result["cache"], [result["losses"]]
    return timed


def _mmft(command: Command, timed: Timed) -> Timed:
    for path in command.finished_runs():
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        timed.losses.append([line["loss"] for line in lines if "loss" in line])
        timed.times = summary["times"]
        timed.loop += summary["times"]["train"]
        timed.cache += summary["times"].get("cache", 0.0)
    return timed


class Memory(threading.Thread):
    """Highest resident memory of a process and what its children hold for themselves, looked at ten times a second.

    What a child holds for itself the kernel works out page by page: of two large ones it was measured to take 70 ms, 0.4 of a core that was
    theirs. So looking takes at most a hundredth of the time: after a look that took long the next one waits.
    A child counts from its second look on: one that is just being started (git, say) still shows its parent's pages as its own.
    """

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.peak, self._over = pid, 0, threading.Event()
        self.start()

    def run(self) -> None:
        import psutil

        known: set[int] = set()
        pause = EVERY
        while not self._over.wait(pause):
            started = time.perf_counter()
            try:
                parent = psutil.Process(self.pid)
                own, children = parent.memory_info().rss, parent.children(recursive=True)
            except psutil.NoSuchProcess:
                return
            for child in children:
                if child.pid in known:
                    with contextlib.suppress(psutil.Error):
                        own += child.memory_full_info().uss
            known = {child.pid for child in children}
            self.peak = max(self.peak, own)
            pause = max(EVERY, (time.perf_counter() - started) / AT_MOST)

    def stop(self) -> None:
        self._over.set()
        self.join()


MATMUL = """
import sys, time, torch
if int(sys.argv[1]): torch.set_num_threads(int(sys.argv[1]))
n, best = 2048, 0.0
a, b = torch.randn(n, n), torch.randn(n, n)
a @ b
for _ in range(8):
    started = time.perf_counter()
    a @ b
    best = max(best, 2 * n**3 / (time.perf_counter() - started))
print(best)
"""


def multiplication_speed(threads: int | None) -> float:
    """FLOP/s of a product of two 2048 x 2048 fp32 matrices, the best of eight: what this machine can do at most."""
    done = subprocess.run([sys.executable, "-c", MATMUL, str(threads or 0)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def place() -> dict[str, str | int | None]:
    """Where this was measured: commit, processor, versions."""
    import importlib.metadata
    import platform

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(encoding="utf-8").splitlines() if facts.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "accelerate")}
    return {
        "commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "--untracked-files=no")), "cpu": cpu,
        "cores": os.cpu_count(), "python": platform.python_version(), **versions,
    }  # fmt: skip
