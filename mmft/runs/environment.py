"""Record what a run ran on: versions, code state, hardware (the run's env.json); peak memory."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..common.private_api import attention_implementation
from ..common.records import CodeState, Environment
from ..models.load import Loaded
from ..system.distributed import world_size
from ..system.processor import processor_name

if TYPE_CHECKING:
    from ..data.prepared import PreparedData

PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "datasets",
    "hydra-core", "omegaconf", "numpy", "pillow", "pyarrow", "modelscope", "swanlab", "tensorboard", "qwen-vl-utils",
)


def environment(loaded: Loaded, prepared: PreparedData, seed: int) -> Environment:
    """Everything outside the config that can change a result."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "mmft": __version__,
        "code": code_state(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in PACKAGES},
        "hardware": {
            "cpu": processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "memory_mb": total_memory_mb(), "gpus": gpus, "cuda": torch.version.cuda if gpus else None,
        },
        "placement": {"cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "processes": world_size(), "host": platform.node()},
        "device": loaded.device,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": attention_implementation(loaded.model.config),
        "seed": seed,
        "model": {
            "path": loaded.located.path, "hub": loaded.located.hub, "revision": loaded.located.revision,
            "class": type(loaded.model).__name__,
        },
        "data": {"path": str(prepared.path), "fingerprint": prepared.fingerprint},
        "image_processor": type(loaded.processor.image_processor).__name__,
        "notes": loaded.notes,
    }


@cache
def version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_state() -> CodeState:
    """Commit of mmft's own checkout and whether it has uncommitted changes; None for an installed copy."""
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return {"commit": None, "changed": None}
    try:
        commit = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(["git", "-C", str(checkout), "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}


def process_started() -> float:
    """The time at which this process started, in seconds since the epoch."""
    import psutil

    return psutil.Process().create_time()


def total_memory_mb() -> int:
    import psutil

    return psutil.virtual_memory().total >> 20


def peak_memory_mb(device: str) -> float:
    """Peak memory in MiB: allocated on the GPU that trains, else resident memory of this process."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux
