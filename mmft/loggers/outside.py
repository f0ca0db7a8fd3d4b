"""What the loggers of other services share: settings to send, a table of answers, the sweep of a run, notices kept off the terminal."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.records import AnswerRecord
from ..reports.pictures import row_pictures
from .tensorboard import side_by_side

if TYPE_CHECKING:
    from PIL.Image import Image

COLUMNS = ("id", "picture", "prompt", "reference", "answer")
REPORT = "report.html"


def require(package: str, logger: str) -> None:
    """Raises UserError if a logger's package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"logger={logger}: needs a package that is not installed: pip install 'mmft[{logger}]'")


def sweep_of(run_dir: Path) -> str | None:
    """The name of the sweep that a run is a point of, or of the sweep in this folder."""
    return next((folder.name for folder in (run_dir, run_dir.parent) if (folder / "plan.json").is_file()), None)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; those with None are left out."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{name}.")
        elif value is not None and value != {}:
            found[name] = value
    return found


def answer_rows(rows: Sequence[AnswerRecord], picture_size: int) -> Iterator[tuple[str, Image | None, str, str, str]]:
    """One tuple of COLUMNS for each row: its pictures side by side, the first reference."""
    for row in rows:
        opened = [p for p in row_pictures(row, picture_size) if p is not None]
        picture = side_by_side(opened) if opened else None
        yield str(row.get("id", "")), picture, str(row.get("prompt") or ""), str((row.get("references") or [""])[0]), str(row.get("prediction") or "")


@contextlib.contextmanager
def quiet(*loggers: str) -> Iterator[None]:
    """Keep a library's notices off the terminal inside the block; what it raises is raised."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
