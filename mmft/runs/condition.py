"""Conditions on runs, such as `lora.r>8 and status==finished`. They are parsed and compared, and never evaluated as Python."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from typing import Any

from ..common.errors import UserError

Values = Callable[[str], Any]  # key -> its value in one run, None if the run has none
Condition = Callable[[Values], bool]

COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip
WORDS = {"true": True, "false": False, "null": None}
GRAMMAR = "write comparisons of a key with a value, such as 'lora.r>8 and status==finished'; a value with other characters than letters, digits, _ and . needs quotes"


def parse_condition(text: str) -> Condition:
    """The condition that `where=TEXT` states. Raises UserError for anything but comparisons of keys with values.

    A run without the key meets no comparison except `== null` and `!= value`. A number is compared with the text of a number as a
    number. `in` looks for the value in a list, or for the key's value among several: `baseline in tags`, `lora.r in [8, 16]`.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f" near character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
        raise UserError(f"where={text}: cannot be read{place}: {GRAMMAR}") from None
    return _condition(tree, text)


def _condition(node: ast.expr, text: str) -> Condition:
    if isinstance(node, ast.BoolOp):
        parts = [_condition(value, text) for value in node.values]
        every = isinstance(node.op, ast.And)
        return lambda values: (all if every else any)(part(values) for part in parts)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        inner = _condition(node.operand, text)
        return lambda values: not inner(values)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, op, right = node.left, node.ops[0], node.comparators[0]
        if isinstance(op, (ast.In, ast.NotIn)):
            member = _membership(left, right, text)
            return member if isinstance(op, ast.In) else lambda values: not member(values)
        if type(op) in COMPARE:
            return _comparison(_key(left, text), COMPARE[type(op)], _value(right, text))
    raise UserError(f"where={text}: {_shown(node)} is no comparison: {GRAMMAR}")


def _comparison(key: str, compare: Callable[[Any, Any], bool], wanted: Any) -> Condition:
    ordered = compare not in (operator.eq, operator.ne)

    def met(values: Values) -> bool:
        own, other = _comparable(values(key), wanted)
        if ordered and (own is None or other is None or isinstance(own, str) != isinstance(other, str)):
            return False
        try:
            return compare(own, other)
        except TypeError:  # a list, a mapping
            return False

    return met


def _membership(left: ast.expr, right: ast.expr, text: str) -> Condition:
    if isinstance(right, (ast.List, ast.Tuple)):
        key, wanted = _key(left, text), [_value(item, text) for item in right.elts]
        return lambda values: any(own == other for own, other in (_comparable(values(key), item) for item in wanted))
    key, item = _key(right, text), _value(left, text)
    return lambda values: item in (values(key) if isinstance(values(key), (list, tuple, str)) else ())


def _key(node: ast.expr, text: str) -> str:
    """A dotted name."""
    pieces: list[str] = []
    while isinstance(node, ast.Attribute):
        pieces.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        raise UserError(f"where={text}: {_shown(node)} is no key: {GRAMMAR}")
    return ".".join([node.id, *pieces])


def _value(node: ast.expr, text: str) -> Any:
    """A number, a quoted text, or a bare word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, str, bool, type(None))):
        return node.value
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        number = _value(node.operand, text)
        if isinstance(number, (int, float)):
            return -number
    if isinstance(node, (ast.Name, ast.Attribute)):
        word = _key(node, text)
        return WORDS.get(word, word)
    raise UserError(f"where={text}: {_shown(node)} is no value: {GRAMMAR}")


def _comparable(own: Any, wanted: Any) -> tuple[Any, Any]:
    """Both as numbers if one is a number and the other can be; a mapping or list stays as it is."""
    if isinstance(wanted, (int, float)) and not isinstance(wanted, bool) and isinstance(own, str):
        own = _number(own)
    if isinstance(own, (int, float)) and not isinstance(own, bool) and isinstance(wanted, str):
        wanted = _number(wanted)
    return own, wanted


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _shown(node: ast.AST) -> str:
    return ast.unparse(node)[:60]
