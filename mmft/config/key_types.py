"""Check keys against a signature, and simple values against annotations given as source text."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from ..common.errors import UserError, nearest

_SIMPLE: dict[str, type | tuple[type, ...]] = {"int": int, "float": (int, float), "bool": bool, "str": str, "None": type(None)}


def kinds(annotation: str) -> list[str]:
    """The members of a union: `Optional[str]` and `str | None` are str and None."""
    return [kind.strip() for kind in annotation.replace("Optional[", "None | ").replace("]", "").split("|")]


def is_text(annotation: str) -> bool:
    """Whether an annotation allows text and nothing else but null."""
    return set(kinds(annotation)) in ({"str"}, {"str", "None"})


def check_keys(section: str, node: Mapping[str, Any], known: Mapping[str, str]) -> None:
    """Refuse unknown keys and values of the wrong type. known: key -> annotation ("": any value). Raises UserError."""
    for key, value in node.items():
        name = f"{section}.{key}" if section else str(key)
        if key not in known:
            hint = nearest(str(key), known)
            raise UserError(f"{name}: no such key.{hint.replace('mean ', f'mean {section}.') if section else hint}")
        check_value(name, value, known[key])


def check_value(name: str, value: Any, annotation: str) -> None:
    """Refuse a value whose type the annotation excludes; an annotation that is not simple allows any value. Raises UserError."""
    allowed = kinds(annotation)
    if not annotation or any(kind not in _SIMPLE for kind in allowed):
        return
    if isinstance(value, bool) and "bool" not in allowed or not any(isinstance(value, _SIMPLE[kind]) for kind in allowed):
        if isinstance(value, str) and "float" in allowed and _is_number(value):
            return  # yaml 1.1 reads 1e-4 as text; `arguments` converts it
        raise UserError(f"{name}={value}: must be {' or '.join(kind.replace('None', 'null') for kind in allowed)}")


def arguments(values: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Values with numbers that yaml read as text (`1e-4`) converted where the key wants a number. known: key -> annotation."""
    return {
        key: float(value) if isinstance(value, str) and "float" in known.get(key, "") and "str" not in known.get(key, "") and _is_number(value) else value
        for key, value in values.items()
    }


def _is_number(text: str) -> bool:
    try:
        return isinstance(ast.literal_eval(text), (int, float))
    except (ValueError, SyntaxError):
        return False
