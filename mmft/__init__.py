"""mmft: config-driven LoRA fine-tuning of vision-language models. The functions of this module are those of the commands (docs/python.md)."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Prepared, Run, UserError, open_run, prepare, runs, train

__version__ = "0.1.0"
__all__ = ["Prepared", "Run", "UserError", "open_run", "prepare", "runs", "train"]


class _RunsPackage(ModuleType):
    """The package mmft.runs, which can be called: mmft.runs("outputs")."""

    def __call__(self, *args: Any, **keys: Any) -> Any:
        return importlib.import_module(".api", __package__).runs(*args, **keys)


importlib.import_module(".runs", __package__).__class__ = _RunsPackage


def __getattr__(name: str) -> Any:
    if name in __all__:  # imported when it is first used: the command line needs none of it
        return getattr(importlib.import_module(".api", __package__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
