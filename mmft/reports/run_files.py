"""Read the files of a run directory that reports need; an interrupted run has fewer of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..common.files import read_jsonl
from ..common.records import AnswerRecord, SamplesEntry
from .numbers import is_number


def series(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one scalar of metrics.jsonl, ordered by step; a step logged twice keeps its last value."""
    points = {row["step"]: row[key] for row in rows if is_number(row.get("step")) and is_number(row.get(key))}
    steps = sorted(points)
    return steps, [points[s] for s in steps]


def read_answers(path: Path, run_dir: Path) -> list[AnswerRecord]:
    """Rows of an eval/*.jsonl file, see `_find_images`."""
    rows = cast("list[AnswerRecord]", read_jsonl(path))
    _find_images(rows, run_dir)
    return rows


def read_samples(run_dir: Path) -> list[SamplesEntry]:
    """Entries of eval/samples.jsonl (answers during training), see `_find_images`."""
    entries = cast("list[SamplesEntry]", read_jsonl(Path(run_dir) / "eval" / "samples.jsonl"))
    _find_images([row for entry in entries for row in entry.get("samples") or () if isinstance(row, dict)], run_dir)
    return entries


def _find_images(rows: Sequence[AnswerRecord], run_dir: Path) -> None:
    """Correct `root` where run and prepared data were moved together (outputs/RUN, outputs/data)."""
    moved_to: dict[str, str] = {}
    for row in rows:
        root = str(row.get("root") or "")
        if root not in moved_to:
            name = root.replace("\\", "/").rstrip("/").split("/")[-1]
            candidates = [parent / "data" / name for parent in Path(run_dir).resolve().parents] if name and not Path(root).is_dir() else []
            moved_to[root] = next((p.as_posix() for p in candidates if p.is_dir()), root)
        row["root"] = moved_to[root]


def flatten(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted key, text) rows."""
    if isinstance(value, dict):
        return [row for k, v in value.items() for row in flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    return [(prefix, "" if value is None else str(value))] if prefix else []
