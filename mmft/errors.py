"""Errors that are a user's to mend: one line, no traceback."""


class UserError(Exception):
    """A mistake in a command, a config or a file; the message names it and says what to do next."""

    exit_code = 2


class Incomplete(UserError):
    """The work was done and written, but not for every input; those left out were named one by one."""

    exit_code = 1


class RowError(UserError):
    """A data row that cannot be used. `row` names it (`file.csv:17` or an id), `reason` says why."""

    def __init__(self, row: str, reason: str):
        super().__init__(f"{row}: {reason}")
        self.row, self.reason = row, reason
