"""Which GPU a point of a sweep runs on: the processes of a launcher take one each of this machine's GPUs."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

# The GPUs that the points may use, as CUDA names them (`0,1`, or UUIDs). The launching process sets the variable for its children, because
# submitit hides every GPU from the processes that it starts. A user sets it to leave some GPUs to others.
DEVICES_VARIABLE = "MMFT_DEVICES"
LAUNCHERS = ("joblib", "submitit_local")  # Slurm and Ray give each job its GPUs themselves


def devices() -> list[str]:
    """The GPUs of this machine that may be used, without importing torch (which would open them)."""
    for variable in (DEVICES_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            return [d.strip() for d in os.environ[variable].split(",") if d.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listing.stdout.splitlines() if line.strip()]


def workers() -> int:
    """How many points run at the same time on this machine: one per GPU; without a GPU, one per two cores."""
    return len(devices()) or max(1, (os.cpu_count() or 1) // 2)


def pass_to_children() -> None:
    """Tell the processes that are started after this which GPUs they may use."""
    os.environ[DEVICES_VARIABLE] = ",".join(devices())


def claim_gpu(launcher: str) -> str | None:
    """Give this process a GPU of its own until it ends, and wait for a free one. Call it before torch opens a GPU. Returns the GPU's name, None without one."""
    if launcher not in LAUNCHERS or not devices():
        return None
    device, _ = _lock_free_gpu(tuple(devices()))
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    return device


@cache  # a process keeps its GPU for all points that it runs
def _lock_free_gpu(names: tuple[str, ...]) -> tuple[str, Any]:
    """(a GPU that no other process of this user's sweeps uses, its lock, which the system releases when this process ends)."""
    from filelock import FileLock, Timeout

    folder = Path(os.environ.get("MMFT_LOCKS") or Path(tempfile.gettempdir()) / f"mmft-devices-{os.environ.get('USER') or os.environ.get('USERNAME') or 'user'}")
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for name in names:
            lock = FileLock(folder / f"{name.replace('/', '-').replace(':', '-')}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            return name, lock
        time.sleep(1)
