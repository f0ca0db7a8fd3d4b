"""Format numbers the same way in terminal tables, pages and Markdown."""

from __future__ import annotations

import math
from typing import TypeGuard

from ..common.records import Difference

MISSING = "-"  # shown for a value that is absent or not finite


def is_number(value: object) -> TypeGuard[float]:
    """True for a finite int or float; False for booleans, NaN and everything else."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def metric(value: object) -> str:
    """A score with three decimals."""
    return f"{value:.3f}" if is_number(value) else MISSING


def plain(value: object) -> str:
    """A number with three significant digits: a scale, a speed."""
    return f"{value:.3g}" if is_number(value) else MISSING


def change(base: object, tuned: object) -> str:
    """tuned - base with its sign."""
    return f"{tuned - base:+.3f}" if is_number(base) and is_number(tuned) else MISSING


def interval(gap: Difference | None) -> str:
    """The interval of a difference: `-0.012 to +0.034`; "" without one."""
    return f"{gap['low']:+.3f} to {gap['high']:+.3f}" if gap else ""


def difference(gap: Difference | None) -> str:
    """A difference with its interval: `-0.010 (-0.030 to +0.012)`."""
    return f"{gap['value']:+.3f} ({interval(gap)})" if gap else MISSING


def p_value(gap: Difference | None) -> str:
    """p with three decimals, at least 0.001; "" without one."""
    return f"{max(gap['p'], 0.001):.3f}" if gap else ""


def count(value: object) -> str:
    """A whole number, shortened from ten thousand on: 9,216, 18.4 K, 2.41 M, 7.00 B."""
    if not is_number(value):
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "K")):
        if value >= size:
            scaled = value / (1e3 if unit == "K" else size)
            return f"{scaled:.1f} K" if unit == "K" else f"{scaled:.2f} {unit}"
    return f"{value:,.0f}"


def duration(seconds: object) -> str:
    """Seconds as `12.3 s`, `1 min 42 s` or `2 h 05 min`."""
    if not is_number(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def memory(megabytes: object) -> str:
    """MiB as MB or GB."""
    if not is_number(megabytes):
        return MISSING
    return f"{megabytes / 1024:.2f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def percent(part: object, whole: object) -> str:
    """part / whole as a percentage: two decimals below 10 %, none above."""
    if not is_number(part) or not is_number(whole) or not whole:
        return MISSING
    share = 100 * part / whole
    return f"{share:.2f}%" if share < 10 else f"{share:.0f}%"
