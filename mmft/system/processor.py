"""What processor this is."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The CPU's model name on Linux, else what Python's platform module knows."""
    return _fact("model name") or platform.processor() or platform.machine()


def processor_vendor() -> str:
    """`AuthenticAMD`, `GenuineIntel` or another vendor's word on Linux and Windows; "" where it is not known."""
    # Windows: "AMD64 Family 25 Model 97 Stepping 2, AuthenticAMD"
    return _fact("vendor_id") or platform.processor().rpartition(", ")[2]


def _fact(name: str) -> str:
    """The first value of a line of /proc/cpuinfo, "" without one."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == name), "")
