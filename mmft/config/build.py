"""Build the object that a config node describes."""

from __future__ import annotations

from typing import Any

from .guard.targets import parameters, resolve
from .validate import arguments, check_keys, to_plain


def build(node: Any, **extra: Any) -> Any:
    """The object a config node describes: its `_target_` called with its other keys (nested nodes built first).

    `extra` are the live objects a config cannot hold (a processor, a run). Errors raised: UserError.
    """
    plain = to_plain(node)
    where = str(getattr(node, "_get_full_key", lambda _: "")(None)) or "config"
    return _build(plain, where, extra)


def _build(node: Any, where: str, extra: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_build(v, f"{where}[{i}]", {}) for i, v in enumerate(node)]
    if not isinstance(node, dict):
        return node
    values = {k: _build(v, f"{where}.{k}", {}) for k, v in node.items() if k != "_target_"}
    if "_target_" not in node:
        return values
    target = resolve(node["_target_"], where)
    known = parameters(target)
    check_keys(where, values, known)
    values = arguments(values, known)
    return target(**values, **{k: v for k, v in extra.items() if k in known})
