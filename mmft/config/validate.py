"""Every key and value of a composed config, checked without importing torch."""

from __future__ import annotations

import ast
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from ..common.errors import UserError, nearest
from . import library_keys
from .guard import secrets
from .guard.targets import check_code_keys, parameters, resolve
from .library_keys import AUGMENT_TRANSFORMS, CONFIG_DIR, GROUPS, METRICS

OBJECTIVES = ("eval_loss", *METRICS)  # what may decide between runs


def check(cfg: DictConfig) -> None:
    """Every key and every simple value of a composed config, without importing torch. Errors raised: UserError."""
    plain = to_plain(cfg)
    check_code_keys(plain)
    secrets.check({k: v for k, v in plain.items() if k != "task"})
    # with run=..., words such as data.path=... are laid over the run's own config, and checked there
    laid_over = (plain.get("task") or {}).get("run") is not None
    _check_targets({"task": plain["task"]} if laid_over else plain)
    defaults = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "config.yaml"))
    check_keys("", plain, {k: "" for k in (*defaults, *GROUPS)})
    check_keys("evaluation", plain["evaluation"], {k: "" for k in defaults["evaluation"]})
    check_augment(plain.get("augment"))
    for key, kind in (("seed", "int"), ("output_dir", "str"), ("name", "str | None"), ("run_dir", "str | None"),
                      ("objective", "str")):  # fmt: skip
        _check_value(key, plain.get(key), kind)
    if plain.get("objective") not in OBJECTIVES:
        hint = nearest(str(plain.get("objective")), OBJECTIVES)
        raise UserError(f"objective={plain.get('objective')}: no such figure.{hint} There are: {', '.join(OBJECTIVES)}.")
    for section, known in (
        ("trainer", library_keys.training_arguments()),
        ("lora", library_keys.lora_config()),
        ("generation", library_keys.generation_config()),
        ("model.quantization", library_keys.quantization_config()),
    ):
        node: Any = plain
        for part in section.split("."):
            node = (node or {}).get(part)
        if node and known:
            check_keys(section, node, known)


def check_keys(section: str, node: dict, known: dict[str, str]) -> None:
    for key, value in node.items():
        name = f"{section}.{key}" if section else str(key)
        if key not in known:
            if section == "trainer" and key in library_keys.MANAGED_TRAINING_ARGUMENTS:
                raise UserError(f"{name}: mmft sets this itself (seed=..., output_dir=... and logger=... are at the top level)")
            hint = nearest(str(key), known)
            raise UserError(f"{name}: no such key.{hint.replace('mean ', f'mean {section}.') if section else hint}")
        _check_value(name, value, known[key])


_SIMPLE: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}


def _check_value(name: str, value: Any, annotation: str) -> None:
    """Refuse a value whose type the annotation (source text) excludes; annotations that are not simple are let through."""
    kinds = [k.strip() for k in annotation.replace("Optional[", "None | ").replace("]", "").split("|")]
    if not annotation or any(k not in _SIMPLE for k in kinds):
        return
    if isinstance(value, bool) and "bool" not in kinds or not any(isinstance(value, _SIMPLE[k]) for k in kinds):
        if isinstance(value, str) and "float" in kinds and _is_number(value):
            return  # yaml 1.1 reads 1e-4 as text; `arguments` turns it into the number
        raise UserError(f"{name}={value}: must be {' or '.join(k.replace('None', 'null') for k in kinds)}")


def _is_number(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), (int, float))
    except (ValueError, SyntaxError):
        return False


def _check_targets(node: Any, where: str = "") -> None:
    if isinstance(node, dict):
        if "_target_" in node:
            target = resolve(node["_target_"], where)
            known = parameters(target)
            check_keys(where, {k: v for k, v in node.items() if k != "_target_"}, known)
        for key, value in node.items():
            _check_targets(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            _check_targets(value, f"{where}[{i}]")


def arguments(values: dict[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """Values with numbers that yaml read as text (`1e-4`) turned into numbers where the key wants one."""
    return {
        k: float(v) if isinstance(v, str) and "float" in known.get(k, "") and "str" not in known.get(k, "") and _is_number(v) else v
        for k, v in values.items()
    }


def to_plain(node: Any) -> Any:
    """A config node as plain dicts and lists, interpolations resolved. Errors raised: UserError naming the key."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except Exception as error:
        key = getattr(error, "full_key", None)
        if type(error).__name__ == "MissingMandatoryValue":
            key = str(key).removeprefix("task.")  # a verb's own keys are typed bare
            raise UserError(f"{key} must be given: add {key}=... to the command") from None
        raise UserError(f"{key}: {one_line(error)}" if key else one_line(error)) from None


def one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text += " (" + " ".join(str(cause).split()) + ")"
    return text


def check_augment(node: Any) -> None:
    """Names and keys of the section `augment`, without torch. Errors raised: UserError."""
    if node is None:
        return
    if not isinstance(node, dict):
        raise UserError(f"augment={node}: must be transforms with their keys, e.g. augment.ColorJitter.brightness=0.2; there are: {', '.join(AUGMENT_TRANSFORMS)}")
    for name, keys in node.items():
        if name not in AUGMENT_TRANSFORMS:
            raise UserError(f"augment.{name}: no such transform.{nearest(str(name), AUGMENT_TRANSFORMS)} There are: {', '.join(AUGMENT_TRANSFORMS)}.")
        if keys is not None and not isinstance(keys, dict):
            raise UserError(f"augment.{name}={keys}: must be its keys ({', '.join(AUGMENT_TRANSFORMS[name])}), {{}} for torchvision's own values, or null for off")
        for key in keys or ():
            if key not in AUGMENT_TRANSFORMS[name]:
                raise UserError(f"augment.{name}.{key}: no such key.{nearest(str(key), AUGMENT_TRANSFORMS[name])} There are: {', '.join(AUGMENT_TRANSFORMS[name])}.")
