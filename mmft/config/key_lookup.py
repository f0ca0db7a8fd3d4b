"""Look up the type of a full key in the classes that a composed config names."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..common.errors import UserError
from . import library_keys
from .guard.targets import parameters, resolve

TOP_LEVEL_TYPES = {"seed": "int", "output_dir": "str", "name": "str | None", "run_dir": "str | None", "rank_by": "str"}


def annotation(cfg: DictConfig, key: str) -> str:
    """The annotation of a key as source text; "" where no class declares the key."""
    parent, _, name = key.rpartition(".")
    if not parent:
        return TOP_LEVEL_TYPES.get(key, "")
    if parent in library_keys.sections():
        return library_keys.sections()[parent].get(name, "")
    try:
        target = OmegaConf.select(cfg, f"{parent}._target_")
        return parameters(resolve(target, key.split(".")[0])).get(name, "") if target is not None else ""
    except (UserError, OmegaConfBaseException):  # the check of the config reports them
        return ""
