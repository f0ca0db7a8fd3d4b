"""What the process and the GPU use right now: a few cheap readings, none of which can fail a run."""

from __future__ import annotations

import sys
import time
from functools import cache

# Processor time is counted in ticks of 10 ms: a share over less than this is noise.
SHORTEST_INTERVAL = 0.2


class Hardware:
    """Takes readings; the processor's share is that of the time since the reading before."""

    def __init__(self) -> None:
        self._since: tuple[float, float] | None = None
        self._cpu: dict[str, float] = {}

    def read(self) -> dict[str, float]:
        """Readings by name, MiB and percent: rss_mb (this process's memory), cpu_percent (of all cores, by this process);
        with a CUDA GPU also gpu_memory_mb and gpu_peak_memory_mb (of this process, as PyTorch counts), gpu_percent
        and gpu_used_mb (of the whole device, through nvidia-ml-py). What cannot be read is left out.
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
            elif now - self._since[0] >= SHORTEST_INTERVAL:
                share = 100 * (used - self._since[1]) / (now - self._since[0])
                self._since, self._cpu = (now, used), {"cpu_percent": share / (psutil.cpu_count() or 1)}
            return {"rss_mb": process.memory_info().rss / 2**20, **self._cpu}
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


@cache
def _nvml_handle(uuid: str):
    """By uuid: CUDA's numbers follow CUDA_VISIBLE_DEVICES, the driver's do not."""
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
