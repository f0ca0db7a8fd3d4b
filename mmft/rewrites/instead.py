"""Another function in the place of one that a model or a library calls, for as long as it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

Ways = list[tuple[Any, str, Any]]  # (object or module, the name of what it has, what is to be called instead)


@contextlib.contextmanager
def instead(found: Ways) -> Iterator[None]:
    """Call these as long as this is open."""
    before = [vars(owner).get(name) for owner, name, _ in found]
    for owner, name, new in found:
        setattr(owner, name, new)
    try:
        yield
    finally:
        for (owner, name, _), old in zip(found, before):
            if old is None:
                delattr(owner, name)  # what its class has stands again
            else:
                setattr(owner, name, old)
