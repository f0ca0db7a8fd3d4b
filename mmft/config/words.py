"""Read one word of a command, KEY=VALUE, with Hydra's grammar; text that the grammar has no place for is quoted first."""

from __future__ import annotations

import functools
import re
import shlex
from typing import Any, NamedTuple

from ..common.errors import UserError
from .key_types import is_text

# `${seed}`, `${oc.env:HOME}`: what OmegaConf replaces. Other `${` in a text are characters.
INTERPOLATION = re.compile(r"\$\{[A-Za-z_][\w.]*(?::[^{}]*)?\}")
_OPENING = re.compile(r"(\\*)\$\{")
_CLOSERS = {"[": "]", "{": "}", "(": ")"}


class Word(NamedTuple):
    """A word split at its first `=`. sign: "", "+", "++" or "~". value: None without a `=`."""

    sign: str
    key: str
    value: str | None


def split(word: str) -> Word:
    """`++lora.r=4` -> ("++", "lora.r", "4")."""
    key, equals, value = word.partition("=")
    bare = key.lstrip("+~")
    return Word(key[: len(key) - len(bare)], bare, value if equals else None)


def parse(word: str, several: bool = False) -> Any:
    """Hydra's Override of a word, text quoted where it must be. several: whether commas separate the values of a sweep.

    Raises UserError that names the character and a form that can be parsed.
    """
    sign, key, value = split(word)
    if value is None and sign != "~":
        raise UserError(f"{word!r} cannot be read as key=value: it has no '='")
    return _override(word if value is None else f"{sign}{key}={readable(word, several=several)}", word)


def read(word: str, annotation: str = "") -> Any:
    """Hydra's Override of the value of a word. annotation: the key's type. Raises UserError as `parse` does."""
    return _override(f"x={readable(word, annotation)}", word)


def readable(word: str, annotation: str = "", several: bool = False) -> str:
    """The value of a word in Hydra's grammar: as typed, or in quotes where it is text that the grammar reads otherwise.

    annotation: the key's type; a key for text takes any value as typed, but for null, quoted text, interpolations and sweeps.
    several: whether commas separate the values of a sweep. Raises UserError for a list or a sweep that cannot be parsed.
    """
    _, key, value = split(word)
    assert value is not None
    text = is_text(annotation)
    if key.startswith("task.") and re.search(r"\s", value) and value[0] not in "[{\"'":
        return quote(value, literal=True)  # a question may contain ${...}
    override = _parsed(f"x={value}")
    if override is None:
        if not text and value[0] in "[{" or several and len(_pieces(value)) > 1:
            raise unreadable(word)
        return quote(value)
    if not text or not value or override.value() is None or value[0] in "\"'" or INTERPOLATION.search(value):
        return value
    if override.is_sweep_override() and (several or _is_function(value)):
        return value
    return quote(value)


def quote(text: str, literal: bool = False) -> str:
    """Text in double quotes, as Hydra's grammar reads it back. literal: `${name}` is text, too."""
    from hydra.core.override_parser.types import Quote, QuotedString

    if literal or not INTERPOLATION.search(text):
        text = _OPENING.sub(r"\1\1\\${", text)
    return QuotedString(text, Quote.double).with_quotes()


def sweep_values(override: Any) -> list[str]:
    """The values of a sweep, each as it would be typed. Raises any error of an interval, which has no list of values."""
    from hydra.core.override_parser.types import Transformer

    def typed(element: Any) -> str:
        text = str(Transformer.str(element))
        return quote(element) if isinstance(element, str) and text != element else text  # Hydra would escape it with backslashes

    return list(override.sweep_iterator(transformer=typed))


def unreadable(word: str) -> UserError:
    """An error that names the character at which a word cannot be parsed, and a form that can be."""
    sign, key, value = split(word)
    forms = [form for form in _forms(value or "") if _parsed(f"x={form}") is not None]
    parsable = _parsed(f"{sign}{key}=1") is not None
    where = _position(f"{sign}{key}={value}")
    key, added = key.removeprefix("task."), len(key) - len(key.removeprefix("task."))  # a verb's key, as it was typed
    word, where = f"{sign}{key}={value}" if value is not None else f"{sign}{key}", where - added
    what = f"character {where + 1}, {word[where]!r}, has no meaning there" if where < len(word) else "it ends too early"
    if not forms or not parsable:
        return UserError(f"{word!r} cannot be read as key=value: {what}")
    return UserError(f"{word!r} cannot be read as key=value: {what}; write {' or '.join(shlex.quote(f'{sign}{key}={form}') for form in forms)}")


def _override(word: str, typed: str) -> Any:
    override = _parsed(word)
    if override is None:
        raise unreadable(typed)
    return override


@functools.cache
def _parsed(word: str) -> Any:
    """Hydra's Override, or None where the word cannot be parsed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        override = OverridesParser.create().parse_override(word)
        override.value()
    except Exception:  # its lexer, parser and functions raise several types
        return None
    return override


def _position(word: str) -> int:
    """The index of the character at which Hydra's grammar stops, as far as its error tells; the word's length for its end."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    try:
        OverridesParser.create().parse_override(word)
    except Exception as error:
        cause = error.__cause__
        start = getattr(cause, "startIndex", None)  # of the lexer
        if start is None and getattr(cause, "offendingToken", None) is not None:
            start = cause.offendingToken.start  # type: ignore[union-attr]  # of the parser
        if start is None:
            token = re.search(r"input '(.*?)' expecting", str(error))
            start = word.find(token[1], word.find("=") + 1) if token and token[1] in word else len(word)
        while start < len(word) and word[start].isspace():
            start += 1
        return int(start)
    return len(word)


def _forms(value: str) -> list[str]:
    """Ways to write a value that cannot be parsed, the likeliest first: missing brackets added, elements quoted, all of it quoted."""
    forms = []
    if value[:1] in ("[", "{"):
        closed = value + _missing_closers(value)
        named = f"[{','.join(piece if _parsed(f'x={piece}') is not None else quote(piece) for piece in _pieces(closed[1:-1]))}]"  # brackets in names of files
        forms = [form for form in (closed, _quote_elements(closed), *([named] if closed[0] == "[" else [])) if _parsed(f"x={form}") is not None][:1]
    elif len(pieces := _pieces(value)) > 1:
        forms = [",".join(piece if _parsed(f"x={piece}") is not None else quote(piece) for piece in pieces)]
    return [*forms, quote(value)] if not (forms and value[:1] in ("[", "{")) else forms


def _missing_closers(value: str) -> str:
    stack = []
    for token in re.findall(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|.", value, re.S):
        if token in _CLOSERS:
            stack.append(_CLOSERS[token])
        elif stack and token == stack[-1]:
            stack.pop()
    return "".join(reversed(stack))


def _quote_elements(value: str) -> str:
    """A list or dict with every element in quotes that Hydra cannot read."""
    parts = re.findall(r"\s*(?:\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*')\s*(?=[\],}]|$)|[\[\]{},]|[^\[\]{},]+", value, re.S)
    for i, part in enumerate(parts):
        element = part.strip()
        if not element or element in "[]{}," or element[0] in "\"'" and _parsed(f"x={element}") is not None:
            continue
        name, colon, rest = part.partition(":")
        if colon and _in_dict(parts[:i]):
            parts[i] = f"{name}:{rest if not rest.strip() or _parsed(f'x={rest.strip()}') is not None else quote(rest.strip())}"
        elif _parsed(f"x={element}") is None:
            parts[i] = quote(element)
    return "".join(parts)


def _in_dict(parts: list[str]) -> bool:
    """Whether the innermost open bracket is a brace."""
    stack = []
    for part in parts:
        if part in "[{":
            stack.append(part)
        elif part in "]}" and stack:
            stack.pop()
    return bool(stack) and stack[-1] == "{"


def _pieces(value: str) -> list[str]:
    """The parts between commas that stand outside of quotes and brackets."""
    pieces, depth = [""], 0
    for token in re.findall(r"\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|.", value, re.S):
        depth += (token in _CLOSERS) - (token in _CLOSERS.values())
        if token == "," and depth <= 0:
            pieces.append("")
        else:
            pieces[-1] += token
    return [piece.strip() for piece in pieces]


def _is_function(value: str) -> bool:
    """Whether a value is a call of Hydra's grammar: choice(1,2), range(3), interval(0,1)."""
    return re.match(r"[A-Za-z_]\w*\s*\(", value) is not None
