"""Which GPU a point of a sweep runs on: the launcher's processes share this machine's GPUs out, one each."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

# The GPUs to share out, as CUDA names them (`0,1`, or UUIDs). The launching process finds them and hands them down here,
# since submitit hides every GPU from the processes it starts; set by hand it leaves some GPUs to others.
DEVICES_VARIABLE = "MMFT_DEVICES"
LAUNCHERS = ("joblib", "submitit_local")  # Slurm and Ray give each job its GPUs themselves


def devices() -> list[str]:
    """The GPUs of this machine that may be used, without importing torch (which would open them)."""
    for variable in (DEVICES_VARIABLE, "CUDA_VISIBLE_DEVICES"):
        if variable in os.environ:
            return [d.strip() for d in os.environ[variable].split(",") if d.strip()]
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.stdout.splitlines() if line.strip()]


def workers() -> int:
    """How many points may run side by side here: one a GPU; without one, one for every two cores."""
    return len(devices()) or max(1, (os.cpu_count() or 1) // 2)


def hand_down() -> None:
    """Tell the processes about to be started which GPUs they share."""
    os.environ[DEVICES_VARIABLE] = ",".join(devices())


def place(launcher: str) -> str | None:
    """Give this process a GPU of its own until it ends; waits for one to be free. Must come before torch opens a GPU."""
    if launcher not in LAUNCHERS or not devices():
        return None
    device, _ = _hold(tuple(devices()))
    os.environ["CUDA_VISIBLE_DEVICES"] = device
    return device


@cache  # a process that has opened a GPU keeps it: the points that follow in it run there too
def _hold(names: tuple[str, ...]) -> tuple[str, Any]:
    """(a GPU that no other process of this user's sweeps holds, the lock that the system opens when this process ends)."""
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
