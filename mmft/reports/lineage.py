"""The runs and adapters that a run builds on, the oldest first, from the env.json of each."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict, cast

from ..common.files import read_json
from ..common.records import ParentRecord
from . import numbers

ROLES = {
    "start": "its adapter went on", "below": "its adapter is merged into the base", "extended": "continued for more steps", "combined": "its adapter is combined",
}  # fmt: skip
DEEPEST = 20  # generations; a chain of files that name each other would not end


class Ancestor(TypedDict):
    """One row. what: what it is to the run below it. of: that run's name. loss: held-out loss as its own run measured it, "" if unknown."""

    name: str
    what: str
    of: str
    steps: str
    loss: str
    sha256: str


def lineage(run_dir: Path, depth: int = 0) -> list[Ancestor]:
    """The ancestors of a run; [] for one that begins with a base model alone."""
    rows: list[Ancestor] = []
    for record in cast("list[ParentRecord]", read_json(run_dir / "env.json").get("parents") or []):
        place = _place(record, run_dir)
        if place is not None and depth < DEEPEST:
            rows += [row for row in lineage(place, depth + 1) if row not in rows]
        summary = read_json(place / "summary.json") if place is not None else {}
        role = str(record.get("role"))
        weight = f" with the weight {record['weight']:g}" if "weight" in record else ""
        gone = "" if place is not None or not record.get("run") else ", missing now"
        rows.append({
            "name": str(record.get("run") or record.get("path")), "what": ROLES.get(role, role) + weight + gone, "of": run_dir.resolve().name,
            "steps": numbers.count(record.get("steps")), "loss": numbers.metric(summary.get("eval_loss")), "sha256": str(record.get("sha256"))[:12],
        })  # fmt: skip
    return rows


def steps_before(run_dir: Path) -> int:
    """Steps that the run's own adapter was trained for in other runs, before this one."""
    steps = 0
    for record in cast("list[ParentRecord]", read_json(run_dir / "env.json").get("parents") or []):
        if record.get("role") == "start":
            place = _place(record, run_dir)
            steps += int(record.get("steps") or 0) + (steps_before(place) if place is not None else 0)
    return steps


def _place(record: ParentRecord, run_dir: Path) -> Path | None:
    """The directory of the run that trained an adapter; None if it is gone, or was never there."""
    path = Path(str(record.get("path")))
    for candidate in (path, path.parent, path.parent.parent, run_dir.resolve().parent / path.name):
        if record.get("run") and candidate.resolve().name == record["run"] and (candidate / "snapshot.yaml").is_file():
            return candidate
    return None
