"""data.without: ids of rows that are left out of a data set, in a file or as a list."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import UserError
from .wording import shown

KEY = "data.without"


def read_ids(given: str | Sequence[object]) -> set[str]:
    """The ids of a list, or in a file: one in each line, as plain text or as a JSON object with `id`. Empty lines and lines that begin with # are skipped.

    Raises UserError for a file that cannot be read or names no id.
    """
    if not isinstance(given, str):
        if not isinstance(given, Sequence) or not given or any(isinstance(each, (dict, list)) for each in given):
            raise UserError(f"{KEY}={given}: must be a file with one row id in each line, or a list of ids: {KEY}=[ID,ID]")
        return {str(each) for each in given}
    path = given
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{KEY}={path}: {error.strerror or error}; name a file with one row id in each line") from None
    except UnicodeDecodeError:
        raise UserError(f"{KEY}={path}: is not UTF-8 text; name a file with one row id in each line") from None
    ids = {_id(line.strip(), path, number) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")}
    if not ids:
        raise UserError(f"{KEY}={path}: names no row; drop the key, or write one row id in each line")
    return ids


def _id(line: str, path: str, number: int) -> str:
    if not line.startswith("{"):
        return line
    try:
        return str(json.loads(line)["id"])
    except (ValueError, KeyError):
        raise UserError(f"{KEY}={path}: line {number} is neither a row id nor an object with one: {shown(line, 60)}") from None
