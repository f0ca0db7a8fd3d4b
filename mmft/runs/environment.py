"""What a run ran on and with: versions, code state, hardware, peak memory (the run's env.json)."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from .. import __version__
from ..system.distributed import world_size

PACKAGES = (
    "torch", "torchvision", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "datasets",
    "hydra-core", "omegaconf", "numpy", "pillow", "pyarrow", "modelscope", "swanlab", "tensorboard", "qwen-vl-utils",
)


def environment(loaded: Any, prepared: Any, seed: int) -> dict[str, Any]:
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
        # which of the machine's GPUs this run was given (null: all of them), and how many processes train it together
        "placement": {"cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"), "processes": world_size(), "host": platform.node()},
        "device": loaded.device,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "attention": getattr(loaded.model.config, "_attn_implementation", None),
        "seed": seed,
        "model": {
            "path": loaded.located.path, "hub": loaded.located.hub, "revision": loaded.located.revision,
            "class": type(loaded.model).__name__,
        },
        "data": {"path": str(prepared.path), "fingerprint": prepared.fingerprint},
        "image_processor": type(loaded.processor.image_processor).__name__,
        "notes": loaded.notes,
    }


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def code_state() -> dict[str, Any]:
    """Commit and cleanliness of mmft's own checkout; null for an installed copy."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return {"commit": None, "changed": None}
    try:
        commit = subprocess.run(["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        status = subprocess.run(["git", "-C", str(here), "status", "--porcelain"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "changed": None}
    return {"commit": commit.stdout.strip(), "changed": bool(status.stdout.strip())}


def processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def process_started() -> float:
    """When this process began, in seconds since the epoch."""
    import psutil

    return psutil.Process().create_time()


def total_memory_mb() -> int:
    import psutil

    return psutil.virtual_memory().total >> 20


def peak_memory_mb(device: str) -> float:
    """Peak of the device that trains: allocated GPU memory, or the resident memory of this process."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes on macOS, KiB on Linux
