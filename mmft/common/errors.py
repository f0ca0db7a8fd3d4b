"""Errors that are a user's to mend: one line, no traceback, with the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a command, a config or a file; the message names it and says what to do next."""

    exit_code = 2
    result: object = None  # what was found before, where there is something

    def __init__(self, message: str = ""):
        if message.startswith("Caught ") and "Original Traceback" in message:
            # torch raises a data worker's error again as kind(text of its traceback); our own line is the last one
            message = message.strip().splitlines()[-1].partition(": ")[2]
        super().__init__(message)


class Incomplete(UserError):
    """The work was done and written, but not for every input; those left out were named one by one."""

    exit_code = 1

    def __init__(self, message: str = "", result: object = None):
        super().__init__(message)
        self.result = result


class Pruned(UserError):
    """A point of a search was ended early because others do better; no mistake of anyone."""

    exit_code = 0


class Preempted(KeyboardInterrupt):
    """A signal asked the run to stop; it has saved what it had, and the same command goes on. Not an error of any part of it."""

    exit_code = 75  # sysexits.h: EX_TEMPFAIL, try again


class RowError(UserError):
    """A data row that cannot be used. `row` names it (`file.csv:17` or an id), `reason` says why."""

    def __init__(self, row: str, reason: str = ""):
        super().__init__(f"{row}: {reason}" if reason else row)
        self.row, self.reason = row, reason


def nearest(word: str, known: Iterable[object]) -> str:
    """` Did you mean X?` for the nearest of `known`, or an empty string."""
    match = difflib.get_close_matches(word, [str(k) for k in known], n=1, cutoff=0.5)
    return f" Did you mean {match[0]}?" if match else ""


def at_least(keys: object, **least: int) -> None:
    """Raises UserError naming the first attribute of `keys` that is below its least value; None passes."""
    for name, lowest in least.items():
        value = getattr(keys, name)
        if value is not None and value < lowest:
            raise UserError(f"{name}={value}: must be {lowest} or more")
