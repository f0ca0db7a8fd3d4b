"""AnswerFile: predictions as CSV or JSONL, written beside and renamed when all are in it."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

from ..common.errors import UserError

KINDS = (".csv", ".jsonl")
COLUMNS = ("image", "prompt", "prediction", "error", "references")  # of the CSV; several images or references: a JSON list


class AnswerFile:
    """Rows as in eval/*.jsonl (JSONL whole, CSV the columns above). Errors raised: UserError for a path that cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix.lower() not in KINDS:
            raise UserError(f"out={path}: must end in {' or '.join(KINDS)}")
        self._refuse_existing()
        self._beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._beside.open("w", encoding="utf-8", newline="" if path.suffix.lower() == ".csv" else "\n")
        except OSError as error:
            raise UserError(f"out={path}: cannot be written: {error.strerror or error}") from None
        self._csv = csv.writer(self._file, lineterminator="\n") if path.suffix.lower() == ".csv" else None
        if self._csv:
            self._csv.writerow(COLUMNS)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise UserError(f"out={self.path}: exists already; choose another name or remove it")

    def add(self, row: dict[str, Any]) -> None:
        if self._csv:
            folder = Path(row.get("root") or "")
            images = [(folder / i).as_posix() for i in row.get("images", ())]
            cells = (_cell(images or [row["id"]]), row.get("prompt", ""), row["prediction"] or "", row.get("error", ""), _cell(row.get("references", [])))
            self._csv.writerow(cells)
        else:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Give the file its name."""
        self._file.close()
        self._refuse_existing()
        os.replace(self._beside, self.path)

    def discard(self) -> None:
        """Remove what was not finished; nothing to do behind `finish`."""
        self._file.close()
        self._beside.unlink(missing_ok=True)


def _cell(values: list[str]) -> str:
    return values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False) if values else ""
