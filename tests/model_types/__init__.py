"""Small random models of transformers' image-text-to-text types, one module for each line of families; each exports `TYPES`.

`TYPES` here maps a model type to how it is built. A new type is a function in a module of its line, and an entry in that module's dict.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .base import LIBRARY, WRITTEN, ModelType, load

TYPES: dict[str, ModelType] = {}
for _module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
    TYPES |= getattr(import_module(f"{__name__}.{_module}"), "TYPES", {})

__all__ = ["LIBRARY", "TYPES", "WRITTEN", "ModelType", "load"]
