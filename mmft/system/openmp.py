"""How long OpenMP's threads wait for the next piece of work before they sleep: long where nothing else computes on this machine, else briefly.

Between the products of a model of some ten million parameters they wait a fraction of a millisecond. To sleep and be woken takes as
long: two cores of an Intel Xeon trained in 0.89 to 0.95 of the time where they waited. But threads that wait hold cores from others: of
two such runs side by side each took 1.6 times as long, and 3 to 5 times with GNU OpenMP's own default.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

VARIABLE = "GOMP_SPINCOUNT"  # read once, when torch and OpenMP with it are loaded
LONG, BRIEF = 20_000, 3_000  # turns of a loop; how long one takes depends on the processor
OTHERS = 0.25  # cores that everybody else may use on a machine that counts as idle

_began: tuple[float, float, float] | None = None


def begin() -> None:
    """At the start of a command; a GOMP_SPINCOUNT that is set already stays."""
    global _began
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = str(BRIEF)
        _began = _reading()


def settle() -> None:
    """Before torch is imported: by what others have computed since `begin`."""
    if _began is None or "torch" in sys.modules or (now := _reading()) is None:
        return
    busy, own, wall = (b - a for a, b in zip(_began, now))
    if busy - own < OTHERS * wall:
        os.environ[VARIABLE] = str(LONG)


def _reading() -> tuple[float, float, float] | None:
    """Seconds that all cores have computed, that this process has, and that have passed; None where there is no /proc/stat."""
    try:
        cpu = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        user, nice, system, _idle, _waiting, *interrupts = (int(ticks) / os.sysconf("SC_CLK_TCK") for ticks in cpu)
    except (OSError, ValueError):
        return None
    return user + nice + system + sum(interrupts), time.process_time(), time.monotonic()
