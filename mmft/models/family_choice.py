"""Which family class a model type needs, and the `model=` option that names it."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
from importlib import import_module

from omegaconf import OmegaConf

from ..common.errors import UserError
from ..config.groups import CONFIG_DIR, group_options
from . import families
from .families.base import Family


def family_class(model_type: str) -> type[Family] | None:
    """The class in mmft/models/families/ that serves a model type; None if the type has no quirks."""
    modules = [import_module(f"{families.__name__}.{module.name}") for module in pkgutil.iter_modules(families.__path__)]
    classes = {c for module in modules for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Family)}
    return next((c for c in classes if model_type in c.model_types), None)


def check_family(family: Family, model_type: str) -> None:
    """Raises UserError if the checkpoint at `family.path` needs another family class.

    A class of another package that names no model types is trusted with every type.
    """
    if model_type in family.model_types:
        return
    needed = family_class(model_type)
    if needed is None and not family.model_types:
        return
    if needed is not None and not family.model_types and type(family) is not Family:
        return
    wanted = option(needed, model_type) if needed is not None else "auto"
    raise UserError(f"model.path={family.path}: a {model_type} needs model={wanted} (with this model.path): {_why(family, needed)}")


def option(needed: type[Family], model_type: str) -> str:
    """The option of the model group that builds this class; of several, the one whose name is nearest to the model type."""
    target = f"{needed.__module__}.{needed.__qualname__}"
    names = [n for n in group_options()["model"] if _target(n) == target]
    return (difflib.get_close_matches(model_type.replace("_", ""), names, n=1, cutoff=0.0) or ["auto"])[0]


def _target(name: str) -> str:
    node = OmegaConf.load(CONFIG_DIR / "model" / f"{name}.yaml")
    return str(node.get("_target_") or (node.get("model") or {}).get("_target_") or "")


def _why(family: Family, needed: type[Family] | None) -> str:
    if needed is None:
        return f"{type(family).__name__} serves {', '.join(family.model_types)}"
    return f"it has rules of its own, in {needed.__name__}"
