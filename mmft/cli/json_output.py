"""`--json`: the result of a verb as one JSON document on stdout; the lines for people go to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

VERBS = ("audit", "doctor", "evaluate", "runs")  # whose results are data


@contextlib.contextmanager
def lines_on_stderr() -> Iterator[None]:
    """Inside the block, what would be printed on stdout goes to stderr."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def print_result(result: object) -> None:
    """Print a verb's result."""
    print(json.dumps(plain(result), ensure_ascii=False, indent=2, allow_nan=False))


def plain(value: Any) -> Any:
    """A result as what JSON has; NaN and infinity, which it has not, are null. A value with a method `plain` says itself what it is."""
    if hasattr(value, "plain"):
        return plain(value.plain())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, int, bool, type(None))):
        return value
    if hasattr(value, "item"):  # a number of numpy
        return plain(value.item())
    return value.as_posix() if isinstance(value, Path) else str(value)
