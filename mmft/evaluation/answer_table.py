"""AnswerFile: write predictions as CSV or JSONL under a temporary name, renamed when complete."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import UserError
from ..common.records import AnswerRecord

SUFFIXES = (".csv", ".jsonl")
COLUMNS = ("image", "prompt", "prediction", "error", "references", "truncated")  # of the CSV; several images or references: a JSON list


class AnswerFile:
    """Rows as in eval/*.jsonl: JSONL with all keys, CSV with COLUMNS. Raises UserError for a path that cannot be written."""

    def __init__(self, path: Path):
        self.path = path
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"out={path}: must end in {' or '.join(SUFFIXES)}")
        self._refuse_existing()
        self._partial = path.with_name(f".{path.name}.{os.getpid()}")
        is_csv = path.suffix.lower() == ".csv"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._partial.open("w", encoding="utf-8", newline="" if is_csv else "\n")
        except OSError as error:
            raise UserError(f"out={path}: cannot be written: {error.strerror or error}") from None
        self._csv = csv.writer(self._file, lineterminator="\n") if is_csv else None
        if self._csv:
            self._csv.writerow(COLUMNS)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise UserError(f"out={self.path}: exists already; choose another name or remove it")

    def add(self, row: AnswerRecord) -> None:
        if self._csv:
            folder = Path(row.get("root") or "")
            images = [(folder / i).as_posix() for i in row.get("images", ())]
            cells = (_cell(images or [row["id"]]), row.get("prompt", ""), row["prediction"] or "", row.get("error", ""), _cell(row.get("references", [])))
            self._csv.writerow((*cells, "true" if row.get("truncated") else ""))
        else:
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def finish(self) -> None:
        """Close the file and give it its name. Raises UserError if the name was taken in the meantime."""
        self._file.close()
        self._refuse_existing()
        os.replace(self._partial, self.path)

    def discard(self) -> None:
        """Remove an unfinished file; does nothing after `finish`."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def _cell(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False) if values else ""
