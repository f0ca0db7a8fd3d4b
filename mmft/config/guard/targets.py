"""The guard: which objects a config's `_target_` may name, and what keys they take."""

from __future__ import annotations

import importlib
import inspect
import os
import re
from typing import Any

from ...common.errors import UserError, nearest

# Packages whose objects a `_target_` may name, beside mmft's own; set by the person at the keyboard, never by a file.
PACKAGES_VARIABLE = "MMFT_PACKAGES"
# What a section may be. mmft has functions that remove folders and classes that open files for writing: being mmft's own is not enough.
BASES = {
    "data": "mmft.data.sources.base.Source", "model": "mmft.models.families.base.Family", "collator": "mmft.collators.base.Collator",
    "logger": "mmft.loggers.base.Logger",
}  # fmt: skip
VERBS = "mmft.verbs."
HYDRA_PARTS = ("mmft.sweeps.optuna_study.Search", "mmft.joint.launcher.Joint")  # what mmft itself has for Hydra's section


# Keys through which a library would import or download code; each is refused wherever it stands.
CODE_KEYS = ("lora.megatron_core", "lora.megatron_config")
# What a processor's loader takes beside the processor's own settings: other code, other files, a token.
LOADER_KEYS = ("code_revision", "revision", "token", "use_auth_token", "cache_dir", "subfolder", "force_download", "local_files_only", "proxies", "_from_auto")
# Set by the flag --trust-remote-code, inherited by the processes of a sweep; a file cannot set it.
TRUST_VARIABLE = "MMFT_TRUST_REMOTE_CODE"


def trusts_remote_code() -> bool:
    """Whether the command said that code which comes with a model may run."""
    return os.environ.get(TRUST_VARIABLE) == "1"


def check_code_keys(plain: dict[str, Any]) -> None:
    """Refuse keys of a composed config through which code would be loaded. Errors raised: UserError."""
    _check_trust(plain, "")
    for key in CODE_KEYS:
        section, _, name = key.partition(".")
        if (plain.get(section) or {}).get(name):
            raise UserError(f"{key}: names a module to import, which a config may not")
    model = plain.get("model") or {}
    if "/" in str(model.get("attn_implementation") or ""):
        raise UserError(f"model.attn_implementation={model['attn_implementation']}: is code from a hub; use sdpa, eager or flash_attention_2")
    for name in model.get("processor") or ():
        if name in LOADER_KEYS:
            raise UserError(f"model.processor.{name}: is no setting of a processor (model.revision=... names a revision)")


def _check_trust(node: Any, where: str) -> None:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        name = f"{where}.{key}" if where else str(key)
        if key == "trust_remote_code" and value not in (False, None):
            raise UserError(f"{name}: a config may not allow a model's own code to run; add the flag --trust-remote-code to the command, if you read that code")
        _check_trust(value, name)


def allowed_packages() -> set[str]:
    """mmft and the packages in $MMFT_PACKAGES."""
    return {"mmft", *filter(None, re.split(r"[\s,:;]+", os.environ.get(PACKAGES_VARIABLE, "")))}


def resolve(target: Any, where: str = "_target_") -> Any:
    """The class that a `_target_` names: a kind of data set, model, collator, logger or task of mmft, or of a package in $MMFT_PACKAGES.

    where: the key of the node, whose first word says which kind it must be. The object's own `__module__` decides, not
    the text: `mmft.os.getcwd` reads like ours and is not. Errors raised: UserError.
    """
    allowed = allowed_packages()
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
    if home.split(".")[0] == "mmft" and not _fits(found, where.split(".")[0]):
        raise refusal
    return found


def _fits(found: Any, section: str) -> bool:
    """Whether an object of mmft is a class that `section` may hold; a section with no kind of its own may hold any of them."""
    if not inspect.isclass(found) or found.__name__.startswith("_"):
        return False
    kinds = {f"{c.__module__}.{c.__qualname__}" for c in found.__mro__}
    is_task = found.__module__.startswith(VERBS)
    if section == "task":
        return is_task
    if section in ("hydra", "config") and f"{found.__module__}.{found.__qualname__}" in HYDRA_PARTS:
        return True
    return BASES[section] in kinds if section in BASES else is_task or bool(kinds & set(BASES.values()))


def parameters(target: Any) -> dict[str, str]:
    """name -> annotation (source text) of what a `_target_` takes from its config node."""
    names = {}
    for p in inspect.signature(target).parameters.values():
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            names[p.name] = p.annotation if isinstance(p.annotation, str) else ""
    return names
