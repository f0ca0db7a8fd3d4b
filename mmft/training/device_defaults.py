"""What the trainer's keys that are null mean on this device: data workers, pinned memory, copies that do not wait."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.settings import Section
from ..system.distributed import world_size

MOST_WORKERS = 4  # processes that read and resize images beside one GPU
SHARED = 2**30  # bytes: the batches that workers have prepared lie in shared memory, which containers often limit to 64 MB


@dataclass(frozen=True)
class Machine:
    """device: cpu, cuda, mps. cores: of this machine that the run may use. processes: of the training. shared: free bytes of shared memory.

    forks: a worker begins as a copy of this process; where it must begin anew, it takes as long as the start of a run.
    """

    device: str
    cores: int
    processes: int
    shared: int
    forks: bool

    @classmethod
    def here(cls, device: str) -> Machine:
        place = Path("/dev/shm")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shared = shutil.disk_usage(place).free if place.is_dir() else 0
        return cls(device.split(":")[0], cores, world_size(), shared, hasattr(os, "fork") and place.is_dir())


def loader_defaults(trainer: Section, machine: Machine, cached: bool) -> tuple[dict[str, Any], str | None]:
    """(values for keys of the data loader, a line about them or None). A value of the config wins.

    On a CPU the loop needs every core itself, so nothing is read beside it. cached: batches come from the feature cache, so there is nothing to read.
    """
    workers, pinned = trainer.get("dataloader_num_workers"), trainer.get("dataloader_pin_memory")
    if machine.device != "cuda":
        return {"dataloader_num_workers": 0 if cached else workers or 0, "dataloader_pin_memory": bool(pinned)}, None
    why = ""
    if cached:
        workers, why = 0, " (features are cached)"
    elif workers is None:
        workers = max(0, min(MOST_WORKERS, machine.cores // max(machine.processes, 1) - 1)) if machine.forks else 0
        if workers and machine.shared < SHARED:
            workers, why = 0, f" ({machine.shared / 2**20:.0f} MB of shared memory are free, and workers need {SHARED >> 20})"
    pinned = True if pinned is None else pinned
    values: dict[str, Any] = {"dataloader_num_workers": workers, "dataloader_pin_memory": pinned}
    if pinned and trainer.get("accelerator_config") is None:
        values["accelerator_config"] = {"non_blocking": True}  # the copy to the GPU does not stop the host
    return values, f"{workers} data workers{why}, {'pinned' if pinned else 'pageable'} memory"


def describe_device(trainer: Section, machine: Machine, values: Section) -> str | None:
    """What a step computes with, in one line; None on a CPU, where nothing is chosen."""
    if machine.device != "cuda":
        return None
    precision = next((name for name in ("bf16", "fp16") if values.get(name)), "fp32")
    attention = {"flash": torch.backends.cuda.flash_sdp_enabled(), "memory-efficient": torch.backends.cuda.mem_efficient_sdp_enabled()}
    kernels = [name for name, enabled in attention.items() if enabled]
    return f"{precision}, {trainer.get('optim')}" + (f", sdpa may use {' and '.join(kernels)} attention" if kernels else "")
