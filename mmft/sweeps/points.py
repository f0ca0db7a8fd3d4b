"""Train one point of a sweep. Every launcher calls `run_point`, in this process or another."""

from __future__ import annotations

import datetime
import logging
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from greenlet import getcurrent
from omegaconf import DictConfig, OmegaConf

from ..common.errors import Pruned, UserError
from ..config.build import build
from ..config.plain import from_plain
from ..config.ranking import ranking
from ..config.snapshot import snapshot
from ..models.fingerprint import import_while_hashing
from ..runs.directory import Run
from ..system.console import set_up_logging
from .directory import Point, PointResult, Sweep, point_name
from .optuna_study import TrialOfPoint, is_trial

if TYPE_CHECKING:
    from ..pipeline.context import RunContext

log = logging.getLogger("mmft")


@dataclass(frozen=True)
class PointJob:
    """A point as launchers carry it to other processes and machines: plain text.

    config: resolved, as yaml. words: the whole command of the point. sweep_dir: the sweep's directory.
    """

    config: str
    words: list[str]
    sweep_dir: str


class Launcher(Protocol):
    """Runs the points of a sweep somewhere."""

    def __call__(self, jobs: list[PointJob]) -> list[PointResult]:
        """What `run_point` returned for each job, in order."""
        ...


def job_of(sweep: Sweep, point: Point) -> PointJob:
    return PointJob(OmegaConf.to_yaml(from_plain(point.config)), point.words, sweep.path.as_posix())


def run_point(job: PointJob, context: RunContext | None = None, wait: bool = True) -> PointResult:
    """Train one point, unless its run is finished: then nothing is touched.

    An earlier run that was stopped is resumed from its newest checkpoint; one without a checkpoint is moved to earlier/. context: what the
    points of this process share. wait: wait for another process that trains this point now; otherwise the status is "running". A
    failure is a status, not an exception.
    """
    from filelock import Timeout

    sweep, cfg = Sweep(job.sweep_dir), OmegaConf.create(job.config)
    assert isinstance(cfg, DictConfig)
    objective = ranking(cfg)
    point = sweep.planned(cfg)
    if point is None:  # a sweeper that invents its points on the way
        (point,) = sweep.add_points([(cfg, job.words, point_name(job.words, [w.lstrip("+").split("=", 1)[0] for w in job.words]))], objective)
    lock = sweep.lock(point.name)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return {"run": (sweep.path / point.name).as_posix(), "status": "running", "objective": None, "reason": None, "reused": False}
    try:
        status = sweep.status(point)
        if status in ("finished", "pruned"):
            return sweep.result(point, objective, reused=True)
        imported = import_while_hashing("transformers.trainer", "peft", model=cfg.model.get("path"))
        if status != "missing" and not _can_resume(sweep.path / point.name, cfg):
            log.info("%-14s %s was %s; what it left is now in %s", "again", point.name, status, sweep.set_aside(point))
        _train(sweep, point, context, imported)
        return sweep.result(point, objective)
    finally:
        lock.release()


def _can_resume(folder: Path, cfg: DictConfig) -> bool:
    from ..training import checkpoints
    from ..training.resume import is_run_of

    return checkpoints.newest(folder / "checkpoints") is not None and is_run_of(folder, cfg)


def _train(sweep: Sweep, point: Point, context: RunContext | None, imported: bool) -> None:
    from ..pipeline.context import RunContext

    folder = sweep.path / point.name
    cfg = from_plain({**point.config, "run_dir": folder.as_posix()})
    set_up_logging()
    point_log = PointLog(folder)
    log.addHandler(point_log)
    try:
        reporter = TrialOfPoint(folder, ranking(cfg)) if is_trial(folder) else None
        context = (context or RunContext()).with_changes(reporter=reporter)
        context.imported |= imported
        build(cfg.task, "task")(cfg, [word.lstrip("+") for word in point.words], context=context)
    except Pruned as error:
        log.info("%-14s %s", "pruned", error)
    except Exception as error:  # whatever it is, the other points go on; its reason and its traceback are kept
        _record_failure(folder, point, cfg, error)
    finally:
        log.removeHandler(point_log)
        point_log.close()


def _record_failure(folder: Path, point: Point, cfg: DictConfig, error: Exception) -> None:
    """Leave a run directory that says why, also if the point failed before it had one."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]
    folder.mkdir(exist_ok=True)
    run = Run(folder)
    if not (folder / "snapshot.yaml").is_file():
        run.write_text("snapshot.yaml", snapshot(cfg))
        run.write_text("overrides.txt", "".join(f"{word}\n" for word in point.words))
    if not (folder / "summary.json").is_file():
        run.write_json("summary.json", {"status": "failed", "name": point.name, "reason": reason})
    trace = "" if isinstance(error, UserError) else "\n" + traceback.format_exc().rstrip()
    log.error("failed         %s%s", reason, trace)


class PointLog(logging.Handler):
    """Writes a point's log records to its log.txt, once the run has created its directory."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.waiting: list[str] = []
        self.owner = getcurrent()  # jointly trained points have a greenlet each

    def emit(self, record: logging.LogRecord) -> None:
        if getcurrent() is not self.owner or getattr(record, "shown", False):
            return
        now = datetime.datetime.now().strftime("%H:%M:%S")
        self.waiting.append(f"{now}  {record.getMessage()}\n")
        if self.folder.is_dir():
            with (self.folder / "log.txt").open("a", encoding="utf-8", newline="\n") as file:
                file.writelines(self.waiting)
            self.waiting = []
