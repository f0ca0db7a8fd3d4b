"""The directory of a sweep: its plan, and the state of each point.

    outputs/sweeps/NAME/plan.json        the points: name, words, identity, config as composed when the point was added
    outputs/sweeps/NAME/lora.r-4/        the run of a point, a run directory like any other, with log.txt
    outputs/sweeps/NAME/earlier/         failed or interrupted runs that were tried again
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from omegaconf import DictConfig

from ..common.errors import UserError
from ..config.identity import config_identity
from ..config.plain import to_plain
from ..runs.directory import Run, plain_name

if TYPE_CHECKING:
    from filelock import BaseFileLock

EARLIER = "earlier"
LONGEST_NAME = 100  # characters of a run's directory name


@dataclass
class Point:
    """One run of a sweep. `words` are the whole command of this point, `config` is resolved."""

    name: str
    words: list[str]
    identity: str
    config: dict[str, Any]


class PointResult(TypedDict):
    """What became of a point. objective: the value that points are ranked by. reused: its run was finished before."""

    run: str
    status: str
    objective: float | None
    reason: str | None
    reused: bool


class Sweep:
    """A sweep's directory. Several processes may call every method at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def points(self) -> list[Point]:
        """Every point ever planned here, the oldest first. Raises UserError for a torn plan."""
        if not (self.path / "plan.json").is_file():
            return []
        return [Point(**p) for p in Run(self.path).read_json("plan.json")["points"]]

    def planned(self, cfg: DictConfig | dict[str, Any]) -> Point | None:
        """The planned point that trains this config; None without one."""
        key = config_identity(cfg)
        return next((p for p in self.points() if p.identity == key), None)

    def add_points(self, wanted: Sequence[tuple[DictConfig | dict[str, Any], Sequence[str], str]], objective: str = "eval_loss") -> list[Point]:
        """The points of (config, words, name), added to the plan if they are new. Two that would train the same are one point.

        The plan keeps the config of a point as it was when the point was added, whatever happens to conf/ later. If another config has
        the name already, part of the identity is appended.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock("plan"):
            points = self.points()
            by_identity, names = {p.identity: p for p in points}, {p.name for p in points}
            selected: dict[str, Point] = {}
            for cfg, words, name in wanted:
                key = config_identity(cfg)
                if key not in by_identity:
                    name = name if name not in names else f"{name}_{key[:6]}"
                    names.add(name)
                    by_identity[key] = Point(name, list(words), key, {**to_plain(cfg), "run_dir": None})
                    points.append(by_identity[key])
                selected[key] = by_identity[key]
            plan = {"format": 1, "name": self.path.name, "objective": objective, "points": [vars(p) for p in points]}
            if not (self.path / "plan.json").is_file() or Run(self.path).read_json("plan.json") != plan:
                Run(self.path).write_json("plan.json", plan)
        return list(selected.values())

    def lock(self, name: str) -> BaseFileLock:
        """A lock between processes; the system releases it when its holder dies, also by SIGKILL."""
        from filelock import FileLock

        folder = self.path / ".locks"
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name}.lock")

    def status(self, point: Point) -> str:
        """finished | failed | interrupted | preempted | unfinished (killed, or running now) | missing"""
        folder = self.path / point.name
        if (folder / "DONE").is_file():
            return "finished"
        if not folder.is_dir():
            return "missing"
        try:
            status: str = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"]
        except (OSError, ValueError, KeyError):
            return "unfinished"
        return status if status != "finished" else "unfinished"  # killed between the summary and DONE

    def set_aside(self, point: Point) -> Path:
        """Move an earlier run of the point to earlier/, under a free name."""
        (self.path / EARLIER).mkdir(exist_ok=True)
        for n in range(1, 10000):
            target = self.path / EARLIER / f"{point.name}-{n}"
            if not target.exists():
                os.replace(self.path / point.name, target)
                return target
        raise UserError(f"{self.path / EARLIER}: no free name for the earlier tries of {point.name}")

    def result(self, point: Point, objective: str, reused: bool = False) -> PointResult:
        """What became of a point, read from its run's files."""
        summary = {}
        if (self.path / point.name / "summary.json").is_file():
            summary = Run(self.path / point.name).read_json("summary.json")
        return {
            "run": (self.path / point.name).as_posix(), "status": self.status(point), "objective": objective_value(summary, objective),
            "reason": summary.get("reason"), "reused": reused,
        }  # fmt: skip


def objective_value(summary: Mapping[str, Any], objective: str) -> float | None:
    """The value in summary.json that `objective` names: eval_loss or a metric."""
    value = summary.get("eval_loss") if objective == "eval_loss" else (summary.get("metrics") or {}).get(objective)
    return float(value) if isinstance(value, (int, float)) else None


def point_name(words: Sequence[str], keys: Sequence[str]) -> str:
    """The words that differ between points, in characters that can be typed back as run=...: `lora.r-4_seed-1`."""
    parts = [plain_name(w.lstrip("+").replace("=", "-")) for w in words if w.lstrip("+").split("=", 1)[0] in keys]
    name = "_".join(parts) or "run"
    if name in ("plan", EARLIER) or len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name
