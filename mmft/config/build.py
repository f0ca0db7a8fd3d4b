"""Build the object that a config section describes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from ..common.errors import UserError
from .guard.targets import parameters, resolve
from .key_types import arguments, check_keys
from .plain import to_plain


def build(node: Any, section: str = "config", /, **extra: Any) -> Any:
    """Call a node's `_target_` with the node's other keys; nested nodes are built first.

    section: the node's full key (`model`), which decides which classes are allowed and is named in messages.
    extra: objects that a config cannot hold (a processor, a run), passed if the target takes them. Raises UserError.
    """
    return _build(to_plain(node), section, extra)


def _build(node: Any, where: str, extra: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(value, f"{where}[{i}]", {}) for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {key: _build(value, f"{where}.{key}", {}) for key, value in node.items() if key != "_target_"}
    if "_target_" not in node:
        return values
    target = resolve(node["_target_"], where)
    known = parameters(target)
    check_keys(where, values, known)
    try:
        return target(**arguments(values, known), **{key: value for key, value in extra.items() if key in known})
    except UserError as error:
        raise UserError(in_place(str(error), where, known)) from None


def in_place(message: str, where: str, keys: Iterable[str]) -> str:
    """A message about keys of a section, `data.limit=0: ...`, for an object that stands deeper in it: `data.sources.chat.limit=0: ...`."""
    section, _, deeper = where.partition(".")
    return re.sub(rf"(?<![\w./-]){section}\.(?=({'|'.join(map(re.escape, keys))})\b)", f"{where}.", message) if deeper else message
