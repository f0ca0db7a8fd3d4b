"""Read memory and load of the process and the GPU; readings that fail are left out."""

from __future__ import annotations

import sys
import time
from functools import cache
from typing import Any

# Processor time is counted in ticks of 10 ms, so a share of a shorter interval is noise.
MIN_INTERVAL = 0.2  # seconds


class Hardware:
    """Takes readings; cpu_percent is the mean since the reading before."""

    def __init__(self) -> None:
        self._since: tuple[float, float] | None = None
        self._cpu: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        """Readings by name, MiB and percent: rss_mb (this process's memory), cpu_percent (of all cores, by this process);
        with a CUDA GPU also gpu_memory_mb and gpu_peak_memory_mb (of this process, counted by PyTorch), gpu_percent
        and gpu_used_mb (of the whole device, through nvidia-ml-py). Values that cannot be read are left out.
        """
        return {**self._process(), **_gpu()}

    def _process(self) -> dict[str, float]:
        try:
            import psutil

            process = psutil.Process()
            times, now = process.cpu_times(), time.monotonic()
            used = times.user + times.system
            if self._since is None:
                self._since = (now, used)
            elif now - self._since[0] >= MIN_INTERVAL:
                share = 100 * (used - self._since[1]) / (now - self._since[0])
                self._since, self._cpu = (now, used), {"cpu_percent": share / (psutil.cpu_count() or 1)}
            return {"rss_mb": process.memory_info().rss / 2**20, **self._cpu}
        except Exception:
            return {}


def _gpu() -> dict[str, float]:
    torch = sys.modules.get("torch")  # without torch the process uses no GPU memory
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
    except Exception:  # no driver library, a virtual GPU that does not support the query, ...
        pass
    return readings


@cache
def _nvml_handle(uuid: str) -> Any:
    """The driver's handle of a GPU, by uuid: CUDA's device numbers follow CUDA_VISIBLE_DEVICES, the driver's do not."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
