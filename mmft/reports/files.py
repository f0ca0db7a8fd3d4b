"""Reading a run directory's files forgivingly: a run that was stopped half-way still gets a report."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeGuard

from ..common.files import read_jsonl


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value can be shown or drawn: a finite number and not a truth value."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def series(rows: list[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values) of one scalar of metrics.jsonl, ordered by step; a step logged twice keeps its last value."""
    points = {row["step"]: row[key] for row in rows if is_number(row.get("step")) and is_number(row.get(key))}
    steps = sorted(points)
    return steps, [points[s] for s in steps]


def read_rows(path: Path, run_dir: Path) -> list[dict[str, Any]]:
    """Evaluation rows, with pictures found again when run and prepared data were moved together (outputs/RUN, outputs/data).

    Rows that hold samples (eval/samples.jsonl) get it for each of them.
    """
    rows = read_jsonl(path)
    homes: dict[str, str] = {}
    for row in [s for r in rows for s in (r["samples"] if isinstance(r.get("samples"), list) else [r]) if isinstance(s, dict)]:
        root = str(row.get("root") or "")
        if root not in homes:
            name = root.replace("\\", "/").rstrip("/").split("/")[-1]
            moved = [parent / "data" / name for parent in Path(run_dir).resolve().parents] if name and not Path(root).is_dir() else []
            homes[root] = next((p.as_posix() for p in moved if p.is_dir()), root)
        row["root"] = homes[root]
    return rows
