"""The directory of a sweep: which points it has, which run is whose, and one point's job (`run_point`), whoever launches it.

    outputs/sweeps/NAME/plan.json        the points: name, words, config_identity, config as composed when the point was added
    outputs/sweeps/NAME/lora.r-4/        the run of a point, as any other run directory, with log.txt
    outputs/sweeps/NAME/earlier/         what failed or was interrupted before it was tried again
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greenlet import getcurrent
from omegaconf import DictConfig, OmegaConf

from ..common.errors import Pruned, UserError
from ..config.identity import config_identity
from ..config.plain import to_plain
from ..runs.directory import Run, plain_name

log = logging.getLogger("mmft")


EARLIER = "earlier"
LONGEST = 100  # characters of a run's directory name


@dataclass
class Point:
    """One run of a sweep. `words` are the whole command of this point, `config` is resolved."""

    name: str
    words: list[str]
    config_identity: str
    config: dict[str, Any]


class Sweep:
    """A sweep's directory. Every method may be called by several processes at once."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def points(self) -> list[Point]:
        """Every point ever planned here, oldest first. Errors raised: UserError for a torn plan."""
        if not (self.path / "plan.json").is_file():
            return []
        return [Point(**p) for p in Run(self.path).read_json("plan.json")["points"]]

    def planned(self, cfg: DictConfig | dict[str, Any]) -> Point | None:
        """The point that trains this config; None where the plan has none."""
        key = config_identity(cfg)
        return next((p for p in self.points() if p.identity == key), None)

    def enter(self, wanted: list[tuple[DictConfig | dict[str, Any], list[str], str]], objective: str = "eval_loss") -> list[Point]:
        """The points of (config, words, name); those not planned yet are added. Two that would train the same are one point.

        The plan keeps the config of a point from the moment it was added: what happens to conf/ later changes nothing.
        A name that another config has already gets the config_identity behind it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self.lock("plan"):
            known = self.points()
            by_identity, names = {p.identity: p for p in known}, {p.name for p in known}
            found: dict[str, Point] = {}
            for cfg, words, name in wanted:
                key = config_identity(cfg)
                if key not in by_identity:
                    name = name if name not in names else f"{name}_{key[:6]}"
                    names.add(name)
                    by_identity[key] = Point(name, list(words), key, {**to_plain(cfg), "run_dir": None})
                    known.append(by_identity[key])
                found[key] = by_identity[key]
            plan = {"format": 1, "name": self.path.name, "objective": objective, "points": [vars(p) for p in known]}
            if not (self.path / "plan.json").is_file() or Run(self.path).read_json("plan.json") != plan:
                Run(self.path).write_json("plan.json", plan)
        return list(found.values())

    def lock(self, name: str) -> Any:
        """A lock between processes; the system frees it when its holder dies, also by SIGKILL."""
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
            status = json.loads((folder / "summary.json").read_text(encoding="utf-8"))["status"]
        except (OSError, ValueError, KeyError):
            return "unfinished"
        return status if status != "finished" else "unfinished"  # killed between the summary and DONE

    def set_aside(self, point: Point) -> Path:
        """Move what an earlier try left out of the way, to a name that is free."""
        (self.path / EARLIER).mkdir(exist_ok=True)
        for n in range(1, 10000):
            target = self.path / EARLIER / f"{point.name}-{n}"
            if not target.exists():
                os.replace(self.path / point.name, target)
                return target
        raise UserError(f"{self.path / EARLIER}: no free name for the earlier tries of {point.name}")

    def outcome(self, point: Point, objective: str, reused: bool = False) -> dict[str, Any]:
        """What `run_point` returns, read from the run's own files."""
        summary = {}
        if (self.path / point.name / "summary.json").is_file():
            summary = Run(self.path / point.name).read_json("summary.json")
        return {
            "run": (self.path / point.name).as_posix(), "status": self.status(point), "objective": objective_value(summary, objective),
            "reason": summary.get("reason"), "reused": reused,
        }  # fmt: skip


def objective_value(summary: dict[str, Any], objective: str) -> float | None:
    """The figure of summary.json that `objective` names (eval_loss or a metric)."""
    value = summary.get("eval_loss") if objective == "eval_loss" else (summary.get("metrics") or {}).get(objective)
    return float(value) if isinstance(value, (int, float)) else None


def point_name(words: list[str], keys: list[str]) -> str:
    """The words that differ between points, in characters that can be typed back as run=...: `lora.r-4_seed-1`."""
    parts = [plain_name(w.lstrip("+").replace("=", "-")) for w in words if w.lstrip("+").split("=", 1)[0] in keys]
    name = "_".join(parts) or "run"
    if name in ("plan", EARLIER) or len(name) > LONGEST:
        name = f"{name[: LONGEST - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def run_point(cfg_yaml: str, overrides: list[str], sweep_dir: str, shared: Any = None, wait: bool = True) -> dict[str, Any]:
    """Train one point, unless its run is finished: then nothing is touched.

    An earlier try that was stopped goes on from its newest checkpoint; what one without a checkpoint left is moved to earlier/.

    cfg_yaml: the point's resolved config. overrides: its words. Every launcher calls this, in this process or another.
    shared: what points in one process have in common (mmft/sweeps/shared_base.py). wait: wait for a process that trains this very
    point now; with False the answer is then {"status": "running"}.
    Returns {"run", "status", "objective": float | None, "reason", "reused"}; a failure is a status, not an exception.
    """
    from filelock import Timeout

    from ..training import checkpoints
    from ..training.resume import of_this_config

    sweep, cfg = Sweep(sweep_dir), OmegaConf.create(cfg_yaml)
    objective = cfg.get("objective", "eval_loss")
    keys = [w.lstrip("+").split("=", 1)[0] for w in overrides]
    point = sweep.planned(cfg)
    if point is None:  # a sweeper that makes up its points on the way
        (point,) = sweep.enter([(cfg, overrides, point_name(overrides, keys))], objective)
    lock = sweep.lock(point.name)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return {"run": (sweep.path / point.name).as_posix(), "status": "running", "objective": None, "reason": None, "reused": False}
    try:
        status = sweep.status(point)
        if status in ("finished", "pruned"):
            return sweep.outcome(point, objective, reused=True)
        if status != "missing" and not (checkpoints.newest(sweep.path / point.name / "checkpoints") and of_this_config(sweep.path / point.name, cfg)):
            log.info("%-14s %s was %s; what it left is now in %s", "again", point.name, status, sweep.set_aside(point))
        _train(sweep, point, shared)
        return sweep.outcome(point, objective)
    finally:
        lock.release()


def _train(sweep: Sweep, point: Point, shared: Any) -> None:
    from ..config.build import build
    from ..system.console import set_up_logging

    folder = sweep.path / point.name
    cfg = OmegaConf.create({**point.config, "run_dir": folder.as_posix()})
    set_up_logging()
    kept = PointLog(folder)
    log.addHandler(kept)
    more = {"shared": shared} if shared is not None else {}
    try:
        build(cfg.task, "task")(cfg, [word.lstrip("+") for word in point.words], **more)
    except Pruned as error:
        log.info("%-14s %s", "pruned", error)
    except Exception as error:  # whatever it is, the other points go on; its reason and its traceback are kept
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
        folder.mkdir(exist_ok=True)
        run = Run(folder)
        if not (folder / "snapshot.yaml").is_file():  # it failed before it had a directory
            from ..config.snapshot import snapshot

            run.write_text("snapshot.yaml", snapshot(cfg))
            run.write_text("overrides.txt", "".join(f"{word}\n" for word in point.words))
        if not (folder / "summary.json").is_file():
            run.write_json("summary.json", {"status": "failed", "name": point.name, "reason": reason})
        trace = "" if isinstance(error, UserError) else "\n" + traceback.format_exc().rstrip()
        log.error("failed         %s%s", reason, trace)
    finally:
        log.removeHandler(kept)
        kept.close()


class PointLog(logging.Handler):
    """What a point says, in its run's log.txt; kept back until the run has made its directory."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.waiting: list[str] = []
        self.owner = getcurrent()  # points that are trained in step have one each

    def emit(self, record: logging.LogRecord) -> None:
        if getcurrent() is not self.owner or getattr(record, "shown", False):
            return
        now = datetime.datetime.now().strftime("%H:%M:%S")
        self.waiting.append(f"{now}  {record.getMessage()}\n")
        if self.folder.is_dir():
            with (self.folder / "log.txt").open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(self.waiting)
            self.waiting = []
