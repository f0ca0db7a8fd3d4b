"""What transformers and peft import at once only because it is installed, kept from them: a third of the time their import takes."""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator
from typing import Any

from . import patience
from .models.revision import read_ahead

# Asked for by few runs, or imported by mmft itself where a set is read with it. Measured: 5.5 to 3.8 seconds, 911 to 735 MB.
UNASKED = ("bitsandbytes", "datasets", "pandas", "pyarrow", "scipy")
BITSANDBYTES = ("is_bitsandbytes_available", "is_bnb_available", "is_bnb_4bit_available")  # what the two ask by


def load(*modules: str, model: str | None = None) -> bool:
    """Import these modules of transformers and peft without what they need not have. Before anything else imports them, or it is in vain.

    What they found missing they hold to be missing from then on; `with_bitsandbytes` is for runs that need it. model: a `model.path`;
    the files of a local one, which will be asked for, are hashed meanwhile. Returns whether any was still to be imported.
    """
    patience.settle()
    fresh = any(name not in sys.modules for name in modules)
    if fresh and model is not None:
        read_ahead(model)
    with unseen(UNASKED), uncollected() if fresh else contextlib.nullcontext():
        for module in modules:
            importlib.import_module(module)
        for look in _looks():
            look()  # now: peft would look when it makes an adapter
    return fresh


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Within the block Python looks for no garbage, and what is there at its end it never looks through again.

    Modules make a million objects and hardly any garbage. Measured: a quarter of the time of an import, and a third of a second for each
    collection that somebody asks for later.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
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
