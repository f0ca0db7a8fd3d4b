"""Texts of data files in messages: cells are shortened, so that no message or report repeats a long one."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 120  # characters of one cell in a message
_LONG_WORD = re.compile(r"\S{200,}")


def shown(cell: object, longest: int = LONGEST) -> str:
    """A cell in a message: its first characters, and its length if it is longer."""
    text = str(cell)
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"


def shorten_words(message: str) -> str:
    """A message whose words without spaces (base64, file names) are shortened; for reasons that other libraries wrote."""
    return _LONG_WORD.sub(lambda match: shown(match.group()), message)


def listed(names: Iterable[object], longest: int = 20) -> str:
    """Column names in a message: at most `longest` of them, each shortened."""
    words = [shown(name, 60) for name in names]
    return ", ".join(words[:longest]) + (f" and {len(words) - longest} more" if len(words) > longest else "")
