"""Settings given in Python, a list of words or a mapping, as the words of a command."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from pathlib import PurePath
from typing import Any

from ..common.errors import UserError
from .groups import GROUPS, verb_keys, verbs
from .words import quote

Overrides = Sequence[str] | Mapping[str, Any] | None  # ["lora.r=4", "model=tiny"], {"lora.r": 4} or {"lora": {"r": 4}}
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w-]*")


def as_words(given: Overrides) -> list[str]:
    """The words of a command: words as they are, a mapping as KEY=VALUE. Raises UserError that names the key."""
    if given is None:
        return []
    if isinstance(given, Mapping):
        return [word for key, value in given.items() for word in _words(str(key), value)]
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(word, str) for word in given):
        raise UserError(f"overrides={given!r}: give a list of words, ['lora.r=4', 'seed=1'], or a dict, {{'lora.r': 4, 'seed': 1}}")
    return list(given)


def bare_keys(verb: str | None, words: Sequence[str]) -> list[str]:
    """Words with `task.` before the verb's own keys, which are typed without it: `mmft predict run=DIR input=FOLDER`."""
    verb = verb or next((w.split("=", 1)[1] for w in words if w.startswith("task=")), "train")
    if verb not in verbs():
        return list(words)
    own = verb_keys(verb)
    return [f"task.{word}" if word.split("=", 1)[0] in own else word for word in words]


def _words(key: str, value: Any) -> Iterator[str]:
    if isinstance(value, Mapping) and value and all(_PLAIN_KEY.fullmatch(str(name)) for name in value):
        for name, inner in value.items():
            yield from _words(f"{key}.{name}", inner)
    else:
        yield f"{key}={_text(key, value, option=_chooses(key))}"


def _chooses(key: str) -> bool:
    """Whether a key chooses options of a group by their names, which stand without quotes."""
    return key in GROUPS or "@" in key or "/" in key or re.fullmatch(r"data\.sources\.[^./@:\s]+", key) is not None


def _text(key: str, value: Any, option: bool = False) -> str:
    """A value in Hydra's grammar, in which it is read back as it is; text is never read as a number, null or an interpolation."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Integral):
        return str(int(value))
    if isinstance(value, Real):
        number = float(value)
        return repr(number) if math.isfinite(number) else str(number)
    if isinstance(value, PurePath):
        value = value.as_posix()
    if isinstance(value, str):
        return value if option else quote(value, literal=True)
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_text(key, each, option) for each in value)}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{_name(key, name)}:{_text(key, each)}' for name, each in value.items())}}}"
    raise UserError(f"{key}: a {type(value).__name__} is no value of a config; give a number, text, true or false, None, a list or a dict of these")


def _name(key: str, name: object) -> str:
    if not re.fullmatch(r"[\w./-]+", str(name)):
        raise UserError(f"{key}: {name!r} cannot be a key here; use letters, digits and . / - _")
    return str(name)
