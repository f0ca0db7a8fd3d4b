"""What transformers and peft import at once only because it is installed, kept from them: a third of the time their import takes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from . import openmp

# Asked for by few runs, or imported by mmft itself where a set is read with it. Measured: 5.5 to 3.8 seconds, 911 to 735 MB.
UNASKED = ("bitsandbytes", "datasets", "pandas", "pyarrow", "scipy")
BITSANDBYTES = ("is_bitsandbytes_available", "is_bnb_available", "is_bnb_4bit_available")  # what the two ask by


def load(*modules: str, meanwhile: Callable[[], object] | None = None) -> bool:
    """Import these modules of transformers and peft without their optional imports; returns whether any was new.

    Must come before anything else imports them. They remember which packages they did not find: `with_bitsandbytes` makes them
    look again. `meanwhile` starts work that goes on during the import.
    """
    openmp.settle()
    fresh = any(name not in sys.modules for name in modules)
    if fresh and meanwhile is not None:
        meanwhile()
    with unseen(UNASKED), uncollected() if fresh else contextlib.nullcontext():
        for module in modules:
            importlib.import_module(module)
        for look in _looks():
            look()  # now: peft would look when it makes an adapter
    return fresh


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Switch Python's garbage collector off for the block.

    Importing these modules creates a million objects and hardly any garbage. Measured gain: a quarter of the import's time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def unseen(names: tuple[str, ...]) -> Iterator[None]:
    """Within the block these packages cannot be found, unless they are imported already."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None is what Python's import system takes for "not there"
    try:
        yield
    finally:
        for name in hidden:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


def with_bitsandbytes() -> None:
    """Have transformers and peft look for it again: for quantised weights, its optimizers, and LoftQ."""
    for look in _looks():
        look.cache_clear()


def _looks() -> Iterator[Any]:
    """The functions by which transformers and peft ask for bitsandbytes, those of them that remember their answer."""
    for module in ("transformers.utils.import_utils", "peft.import_utils"):
        for name in BITSANDBYTES:
            look = getattr(sys.modules.get(module), name, None)
            if hasattr(look, "cache_clear"):
                yield look
