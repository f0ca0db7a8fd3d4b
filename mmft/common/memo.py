"""Values that are computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class Memo:
    """Values by key, each computed at its first use."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """The value of `key`, computed if it is new. Callers of one key expect one type."""
        if key not in self._values:
            self._values[key] = compute()
        value: T = self._values[key]
        return value

    def clear(self) -> None:
        self._values.clear()
