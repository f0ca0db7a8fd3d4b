"""AnswerFile: predictions as CSV or JSONL. Each answer is logged as it comes; the file is written when all are there."""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ..common.errors import UserError
from ..common.records import AnswerRecord

if TYPE_CHECKING:
    from filelock import BaseFileLock

SUFFIXES = (".csv", ".jsonl")
# of the CSV; several images or references: a JSON list; boxes: a JSON list of {label, image, box | point} in pixels of the image file
COLUMNS = ("image", "prompt", "prediction", "error", "references", "truncated", "boxes")


class AnswerFile:
    """Rows as in eval/*.jsonl: JSONL with all keys, CSV with COLUMNS. Raises UserError for a path that cannot be written.

    Answers go to a log beside the file (.NAME.partial), in the order in which they come. The log of a command that was killed is continued by
    the next one with the same identity. done: the index of each answer in the log -> where its line begins.

    choices: of chosen answers, if all rows have the same ones: the CSV gets a column `p(CHOICE)` for each; [] for different ones: a column
    `probabilities` with JSON; None for generated answers.
    """

    def __init__(self, path: Path, choices: Sequence[str] | None = None):
        self.path, self.choices = path, choices
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"out={path}: must end in {' or '.join(SUFFIXES)}")
        self._refuse_existing()
        self.log_path = path.with_name(f".{path.name}.partial")
        self.done: dict[int, int] = {}
        self._header: dict[str, Any] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(path)
            self._log: BinaryIO = self.log_path.open("a+b")
        except OSError as error:
            raise UserError(f"out={path}: cannot be written: {error.strerror or error}") from None
        self._read_log()

    def begin(self, identity: Mapping[str, str]) -> str | None:
        """Continue the log if it has this identity; otherwise begin it anew. Returns what is to be told about an earlier command.

        identity: what decides the answers, by the name that a user knows.
        """
        earlier = self._header.get("identity")
        changed = [name for name in identity if earlier is None or earlier.get(name) != identity[name]]
        if self.done and not changed:
            return f"{len(self.done)} are there from a command that was stopped; the others follow"
        told = f"{len(self.done)} of a command that was stopped are dropped, since it had another {', another '.join(changed)}" if self.done else None
        self.done = {}
        self._log.truncate(0)
        self._write({"identity": dict(identity)})
        return told

    def add(self, row: AnswerRecord) -> None:
        """Log an answer. It survives the end of this process."""
        self.done[row["index"]] = self._write(row)

    def records(self) -> Iterator[AnswerRecord]:
        """The logged answers by their index, read one by one."""
        for index in sorted(self.done):
            self._log.seek(self.done[index])
            yield json.loads(self._log.readline())

    def finish(self) -> None:
        """Write the file and remove the log. Raises UserError if the file's name was taken in the meantime."""
        self._refuse_existing()
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        is_csv = self.path.suffix.lower() == ".csv"
        try:
            with beside.open("w", encoding="utf-8", newline="" if is_csv else "\n") as file:
                table = csv.writer(file, lineterminator="\n") if is_csv else None
                if table:
                    more = [] if self.choices is None else [f"p({choice})" for choice in self.choices] or ["probabilities"]
                    table.writerow([*COLUMNS, *more])
                for row in self.records():
                    if table:
                        table.writerow([*_cells(row), *self._probabilities(row)])
                    else:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
            os.replace(beside, self.path)
        finally:
            beside.unlink(missing_ok=True)
        self.drop()

    def drop(self) -> None:
        """Forget the logged answers."""
        self.done = {}

    def __enter__(self) -> AnswerFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the file; the log stays only if it holds answers that are not in the file."""
        self._log.close()
        if not self.done:
            self.log_path.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)

    def _refuse_existing(self) -> None:
        if self.path.exists():
            raise UserError(f"out={self.path}: exists already; choose another name or remove it")

    def _probabilities(self, row: AnswerRecord) -> list[object]:
        if self.choices is None:
            return []
        found = row.get("probabilities") or {}
        return [found.get(choice, "") for choice in self.choices] or [json.dumps(found, ensure_ascii=False) if found else ""]

    def _write(self, value: Mapping[str, Any]) -> int:
        where = self._log.seek(0, os.SEEK_END)
        self._log.write(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._log.flush()
        return where

    def _read_log(self) -> None:
        """Find the answers in the log. It is cut where a line is torn."""
        where = self._log.seek(0)
        for line in self._log:
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                value = None
            if not isinstance(value, dict) or where and not isinstance(value.get("index"), int):
                self._log.truncate(where)
                break
            if where:
                self.done[value["index"]] = where
            else:
                self._header = value
            where += len(line)


def _lock(path: Path) -> BaseFileLock:
    """Raises UserError if another command writes this file now."""
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"out={path}: another command is writing it now; wait for it or choose another name") from None
    return lock


def _cells(row: AnswerRecord) -> tuple[str, ...]:
    folder = Path(row.get("root") or "")
    images = [(folder / i).as_posix() for i in row.get("images", ())]
    cells = (_cell(images or [row["id"]]), row.get("prompt", ""), row["prediction"] or "", row.get("error", ""), _cell(row.get("references", [])))
    boxes = row.get("boxes")
    return (*cells, "true" if row.get("truncated") else "", json.dumps(boxes, ensure_ascii=False) if boxes else "")


def _cell(values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else json.dumps(values, ensure_ascii=False) if values else ""
