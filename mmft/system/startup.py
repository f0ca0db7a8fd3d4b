"""Skip optional imports of transformers and peft that this run does not use: a third of the time that importing them takes."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

# Packages that few runs use. Measured gain of skipping them: 5.5 to 3.8 seconds of import time, 911 to 735 MB of memory (docs/speed.md).
OPTIONAL = ("bitsandbytes", "datasets", "pandas", "pyarrow", "scipy")
BITSANDBYTES = ("is_bitsandbytes_available", "is_bnb_available", "is_bnb_4bit_available")  # how both look for it


def load(*modules: str, meanwhile: Callable[[], object] | None = None) -> bool:
    """Import these modules of transformers and peft without their optional imports; returns whether any was new.

    Must come before anything else imports them. They remember which packages they did not find: `with_bitsandbytes` makes them
    look again. `meanwhile` starts work that goes on during the import.
    """
    fresh = any(name not in sys.modules for name in modules)
    if fresh and meanwhile is not None:
        meanwhile()
    with hidden(OPTIONAL), without_garbage_collection() if fresh else contextlib.nullcontext():
        for module in modules:
            try:
                importlib.import_module(module)
            except ImportError:  # a program that uses mmft has imported parts of them before, which rely on what is hidden here
                with found(OPTIONAL):
                    importlib.import_module(module)
        for lookup in _lookups():
            lookup()  # remember the answer now: peft would look when it creates an adapter
    if fresh:
        keep_from_garbage_collection()
    return fresh


def keep_from_garbage_collection() -> None:
    """Take every object that exists now out of the garbage collector's view, until the process ends.

    Each full collection would look at the million objects of the imports: up to half a second, several times in a short run.
    Measured gain: a command of ten steps of the tiny model takes 0.92 of the time (docs/speed.md). They are put back at exit:
    libraries that count their objects there (nanobind) would report the frozen ones as leaks.
    """
    gc.freeze()
    atexit.unregister(gc.unfreeze)
    atexit.register(gc.unfreeze)


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
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
def hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Let the import system not find these packages inside the block, unless they are imported already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None stands for a module that does not exist
    try:
        yield
    finally:
        for name in absent:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)


@contextlib.contextmanager
def found(names: tuple[str, ...]) -> Iterator[None]:
    """Let the import system find hidden packages again inside the block, and behind it."""
    for name in names:
        if name in sys.modules and sys.modules[name] is None:
            del sys.modules[name]
    yield


def with_bitsandbytes() -> None:
    """Let transformers and peft look for bitsandbytes again: for quantised weights, its optimizers, and LoftQ."""
    for lookup in _lookups():
        lookup.cache_clear()


def _lookups() -> Iterator[Any]:
    """The functions by which transformers and peft look for bitsandbytes, if they remember their answer."""
    for module in ("transformers.utils.import_utils", "peft.import_utils"):
        for name in BITSANDBYTES:
            lookup = getattr(sys.modules.get(module), name, None)
            if hasattr(lookup, "cache_clear"):
                yield lookup
