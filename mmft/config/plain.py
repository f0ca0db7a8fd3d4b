"""Convert a composed config to plain dicts and lists."""

from __future__ import annotations

import re
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf

from ..common.errors import UserError
from .settings import Settings


def to_plain(node: Any) -> Any:
    """A config node as plain dicts and lists, interpolations resolved. Raises UserError that names the key."""
    if not isinstance(node, (DictConfig, ListConfig)):
        return node
    try:
        return OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
    except Exception as error:
        key = getattr(error, "full_key", None)
        if type(error).__name__ == "MissingMandatoryValue":
            key = str(key).removeprefix("task.")  # a verb's own keys are typed without `task.`
            raise UserError(f"{key} must be given: add {key}=... to the command") from None
        raise UserError(f"{key}: {one_line(error)}" if key else one_line(error)) from None


def resolved(cfg: DictConfig | Settings) -> Settings:
    """A whole config as plain values. Raises UserError that names the key."""
    return cast(Settings, to_plain(cfg))


def from_plain(values: object) -> Any:
    """A config node of plain values, in which a text with `${` is no interpolation."""
    return OmegaConf.create(_escaped(values))


def has_interpolation(values: object) -> bool:
    """Whether a text in plain values is an interpolation; `\\${` is text."""
    if isinstance(values, dict):
        return any(has_interpolation(v) for v in [*values, *values.values()])
    if isinstance(values, list):
        return any(has_interpolation(v) for v in values)
    return isinstance(values, str) and re.search(r"(?<!\\)(\\\\)*\$\{", values) is not None


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _escaped(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_escaped(v) for v in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def one_line(error: Exception) -> str:
    """An exception's message, and that of its cause, in one line."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text += " (" + " ".join(str(cause).split()) + ")"
    return text
