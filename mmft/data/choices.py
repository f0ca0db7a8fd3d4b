"""The choices of rows: the texts that an answer can be, given for all rows, by a column, or as lettered options in the prompt."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..common.errors import UserError, nearest
from .sample import Row, message_text
from .wording import listed, shown

LETTERS = "letters"  # data.choices=letters: the options are named A, B, C, ... in the prompt, and the answer is a letter
# "(A) cat", "A. cat", "A) cat", "A: cat", each with white space or a line's start before it
_OPTION = re.compile(r"(?<!\S)(?:\(([A-Z])\)|([A-Z])[.):])(?=\s*\S)")


def as_choices(given: object, key: str) -> tuple[str, ...] | str | None:
    """The value of `data.choices` or `choose`: LETTERS, or at least two different texts; None for null. Raises UserError."""
    if given is None or given == LETTERS:
        return LETTERS if given is not None else None
    if isinstance(given, str) or not isinstance(given, Sequence):
        hint = nearest(str(given), (LETTERS,))
        raise UserError(f"{key}={given}: must be a list of texts, {key}=[cat,dog], or {LETTERS} (options A, B, C, ... in the prompt).{hint}")
    for choice in given:
        if isinstance(choice, bool) or not isinstance(choice, (str, int, float)):
            raise UserError(f"{key}: {str(choice).lower()} is no text; write it in quotes: '{key}=[\"yes\",\"no\"]'")
    choices = tuple(str(choice).strip() for choice in given)
    if (problem := list_problem(choices)) is not None:
        raise UserError(f"{key}=[{','.join(choices)}]: {problem}")
    return choices


def list_problem(choices: Sequence[str]) -> str | None:
    """Why nothing can be chosen from these texts, as `kind: detail`; None if something can."""
    if not all(choices):
        return "empty choice: a choice has no text"
    if len(choices) < 2:
        return f"too few choices: {len(choices)}, and a choice needs at least two"
    twice = next((c for i, c in enumerate(choices) if c in choices[:i]), None)
    return None if twice is None else f"duplicate choices: {shown(twice)!r} is there twice"


def letters_in(text: str) -> list[str]:
    """The letters of the options in a prompt: A, B, ... as far as they follow each other; [] for fewer than two.

    Of several runs that begin with A (an example before the question), the last one counts.
    """
    found: list[str] = []
    for match in _OPTION.finditer(text):
        letter = match[1] or match[2]
        if letter == "A":
            found = ["A"]
        elif found and ord(letter) == ord(found[-1]) + 1:
            found.append(letter)
    return found if len(found) > 1 else []


def add_choices(row: Row, given: str | Sequence[str] | None) -> str | None:
    """Set the choices of a row that has none of its own. Returns why the row cannot be used, or None. given: data.choices."""
    if not row.choices and given == LETTERS:
        row.choices = letters_in(message_text(row.messages[-2]) if len(row.messages) > 1 else "")
        if not row.choices:
            return "no options: data.choices=letters, and the prompt does not name A, B, ... in order"
    elif not row.choices and given is not None:
        row.choices = list(given)
    if not row.choices:
        return None
    row.choices = [choice.strip() for choice in row.choices]
    if (problem := list_problem(row.choices)) is not None:
        return problem
    other = next((r for r in row.references if r not in row.choices), None)
    return None if other is None else f"reference not among the choices: {shown(other)!r} is none of {listed(row.choices)}"
