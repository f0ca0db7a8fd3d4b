"""Decide which classes a config's `_target_` may name, and read which keys they take."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from typing import Any

from ...common.errors import UserError, nearest
from . import moved_targets

# Further packages whose objects a `_target_` may name. Set in the user's environment; a file cannot set it.
PACKAGES_VARIABLE = "MMFT_PACKAGES"
# The base classes of each section. It does not suffice that an object is mmft's: some of its functions remove folders, some classes
# open files for writing.
BASES = {
    "data": ("mmft.data.sources.base.BaseSource", "mmft.data.mix.Mix"), "model": ("mmft.models.families.base.Family",), "collator": ("mmft.collators.base.Collator",),
    "logger": ("mmft.loggers.base.Logger",), "metrics": ("mmft.evaluation.metrics.base.Metric",),
    "objective": ("mmft.losses.objectives.Objective",),
}  # fmt: skip
VERBS = "mmft.verbs."
HYDRA_PARTS = ("mmft.sweeps.optuna_study.Search", "mmft.joint.launcher.Joint")  # mmft's own classes for Hydra's section


def allowed_packages() -> set[str]:
    """mmft and the packages in $MMFT_PACKAGES."""
    return {"mmft", *filter(None, re.split(r"[\s,:;]+", os.environ.get(PACKAGES_VARIABLE, "")))}


def resolve(target: Any, where: str = "_target_") -> Any:
    """The class that a `_target_` names: a data source, model family, collator, logger or verb of mmft, or of a package in $MMFT_PACKAGES.

    where: the node's full key, whose section decides which base class is required. The object's `__module__` decides whose it is,
    not the text: `mmft.os.getcwd` is not an object of mmft. Raises UserError.
    """
    allowed = allowed_packages()
    refusal = UserError(
        f"{where}: _target_ {target} is refused: only objects of mmft may be built from a config"
        f" (add your own package's name to the environment variable {PACKAGES_VARIABLE})"
    )
    if not isinstance(target, str) or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise refusal
    target = moved_targets.current(target)
    parts = target.split(".")
    if parts[0] not in allowed or any(p.startswith("__") for p in parts):
        raise refusal
    resolved: Any = None
    for i in range(len(parts) - 1, 0, -1):
        try:
            resolved = importlib.import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if error.name and ".".join(parts[:i]).startswith(error.name):
                continue
            raise UserError(f"{where}: _target_ {target} needs the package {error.name}, which is not installed") from None
        break
    for name in parts[i:] if resolved is not None else ():
        if not hasattr(resolved, name):
            raise UserError(f"{where}: _target_ {target}: {resolved.__name__} has no {name}.{nearest(name, vars(resolved))}")
        resolved = getattr(resolved, name)
    if resolved is None:
        raise UserError(f"{where}: _target_ {target}: no such module")
    home = getattr(resolved, "__module__", None) or ""
    if home.split(".")[0] not in allowed or not callable(resolved):
        raise refusal
    if home.split(".")[0] == "mmft" and not _fits(resolved, _section(where)):
        raise refusal
    return resolved


def _section(where: str) -> str:
    """The section that a key lies in; of a set in evaluation.keep its `data` or `metrics`."""
    parts = where.split(".")
    return parts[3] if parts[:2] == ["evaluation", "keep"] and len(parts) > 3 else parts[0]


def _fits(candidate: Any, section: str) -> bool:
    """Whether an object of mmft is a class that `section` may name; a section without a base class may name any of these classes."""
    if not inspect.isclass(candidate) or candidate.__name__.startswith("_"):
        return False
    kinds = {f"{c.__module__}.{c.__qualname__}" for c in candidate.__mro__}
    is_verb = candidate.__module__.startswith(VERBS)
    if section == "task":
        return is_verb
    if section in ("hydra", "config") and f"{candidate.__module__}.{candidate.__qualname__}" in HYDRA_PARTS:
        return True
    return bool(kinds.intersection(BASES[section])) if section in BASES else is_verb or any(kinds.intersection(bases) for bases in BASES.values())


def parameters(target: Any) -> dict[str, str]:
    """name -> annotation (source text) of a class's arguments."""
    names = {}
    for p in inspect.signature(target).parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            names[p.name] = p.annotation if isinstance(p.annotation, str) else ""
    return names
