"""The guard: which objects a config's `_target_` may name, and what keys they take."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from typing import Any

from .errors import UserError, nearest

# Packages whose objects a `_target_` may name, beside mmft's own; set by the person at the keyboard, never by a file.
PACKAGES_VARIABLE = "MMFT_PACKAGES"


def resolve(target: Any, where: str = "_target_") -> Any:
    """The class or function that a `_target_` names, if it is mmft's own or of a package in $MMFT_PACKAGES.

    The object's own `__module__` decides, not the text: `mmft.os.getcwd` reads like ours and is not.
    Errors raised: UserError.
    """
    allowed = {"mmft", *filter(None, re.split(r"[\s,:;]+", os.environ.get(PACKAGES_VARIABLE, "")))}
    refusal = UserError(
        f"{where}: _target_ {target} is refused: only objects of mmft may be built from a config"
        f" (add your own package's name to the environment variable {PACKAGES_VARIABLE})"
    )
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise refusal
    parts = target.split(".")
    if parts[0] not in allowed or any(p.startswith("__") for p in parts):
        raise refusal
    found: Any = None
    for i in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if error.name and ".".join(parts[:i]).startswith(error.name):
                continue
            raise UserError(f"{where}: _target_ {target} needs the package {error.name}, which is not installed") from None
        break
    for name in parts[i:] if found is not None else ():
        if not hasattr(found, name):
            raise UserError(f"{where}: _target_ {target}: {found.__name__} has no {name}.{nearest(name, vars(found))}")
        found = getattr(found, name)
    if found is None:
        raise UserError(f"{where}: _target_ {target}: no such module")
    home = getattr(found, "__module__", None) or ""
    if home.split(".")[0] not in allowed or not callable(found):
        raise refusal
    return found


def parameters(target: Any) -> dict[str, str]:
    """name -> annotation (source text) of what a `_target_` takes from its config node."""
    names = {}
    for p in inspect.signature(target).parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            names[p.name] = p.annotation if isinstance(p.annotation, str) else ""
    return names
