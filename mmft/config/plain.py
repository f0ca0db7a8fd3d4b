"""Convert a composed config to plain dicts and lists."""

from __future__ import annotations

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


def one_line(error: Exception) -> str:
    """An exception's message, and that of its cause, in one line."""
    text = " ".join(str(error).split())
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text += " (" + " ".join(str(cause).split()) + ")"
    return text
