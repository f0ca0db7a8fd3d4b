"""What the process and the GPU use right now: a few cheap readings, none of which can fail a run."""

from __future__ import annotations

import sys
from functools import lru_cache


def hardware() -> dict[str, float]:
    """Readings by name: rss_mb (this process's memory), cpu_percent (of all cores, since the last call); with a CUDA
    GPU also gpu_memory_mb and gpu_peak_memory_mb (of this process, as PyTorch counts), gpu_percent and
    gpu_used_mb (of the whole device, through nvidia-ml-py). MiB and percent. What cannot be read is left out.
    """
    return {**_process(), **_gpu()}


@lru_cache(maxsize=None)
def _this_process():
    import psutil

    process = psutil.Process()
    process.cpu_percent()  # the first call only starts the clock and returns 0
    return process


def _process() -> dict[str, float]:
    try:
        import psutil

        process = _this_process()
        return {
            "rss_mb": process.memory_info().rss / 2**20,
            "cpu_percent": process.cpu_percent() / (psutil.cpu_count() or 1),
        }
    except Exception:
        return {}


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")  # a process that has not imported torch holds no GPU memory
    try:
        if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
            return {}
        readings = {
            "gpu_memory_mb": torch.cuda.memory_allocated() / 2**20,
            "gpu_peak_memory_mb": torch.cuda.max_memory_allocated() / 2**20,
        }
    except Exception:
        return {}
    try:
        import pynvml

        handle = _nvml_handle(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))
        readings["gpu_percent"] = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        readings["gpu_used_mb"] = pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**20
    except Exception:  # no driver library, a virtual slice that refuses the question, ...
        pass
    return readings


@lru_cache(maxsize=None)
def _nvml_handle(uuid: str):
    """By uuid: CUDA's numbers follow CUDA_VISIBLE_DEVICES, the driver's do not."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
