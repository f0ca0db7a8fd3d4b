"""Run a sweep: compose every point once, train those that are not finished, end with a leaderboard."""

from __future__ import annotations

import csv
import hashlib
import io
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from ..common.errors import UserError
from ..config import sweep_overrides
from ..config.build import build
from ..config.command import Command
from ..loggers.base import Board, Logger
from ..models.fingerprint import import_while_hashing
from ..reports import leaderboard, leaderboard_page, terminal
from ..runs.directory import plain_name
from ..system.console import set_up_logging
from ..system.signals import listening
from .directory import Point, PointResult, Sweep, point_name
from .points import Launcher, PointJob, job_of, run_point

if TYPE_CHECKING:
    from .context import SweepContext

log = logging.getLogger("mmft")

NOT_IN_NAME = ("output_dir", "name", "logger", "rank_by", "model", "data", "experiment", "task")  # keys that do not change the sweep's name


def run_sweep(command: Command, launch: Launcher) -> list[str]:
    """Run a sweep; returns one line for each failed point. Raises UserError before anything is written."""
    set_up_logging()
    sweep, points, objective = plan_sweep(command)
    todo = [p for p in points if sweep.status(p) != "finished"]
    log.info("%-14s %s", "sweep", sweep.path)
    log.info("%-14s %d, %d of them finished already", "points", len(points), len(points) - len(todo))
    results = launch([job_of(sweep, p) for p in todo])
    show_leaderboard(sweep.path, points[0].config["logger"] if todo else None)
    return [f"{r['run']}: {r['reason'] or r['status']}" for r in results if r["status"] != "finished"]


def plan_sweep(command: Command) -> tuple[Sweep, list[Point], str]:
    """(the sweep's directory, this command's points, the objective); every config is composed and checked. Raises UserError."""
    words, keys = sweep_overrides.expand(command.overrides, command.config_dir)
    configs = sweep_overrides.compose_each(words, command.config_dir, command.config_name)
    if any(cfg.lora.get("start") or cfg.model.get("adapters") for cfg in configs):
        from ..runs.parents import resolve_names

        for cfg in configs:  # a short name such as `last` stands for the run that it means now
            resolve_names(cfg)
    first = configs[0]
    if first.run_dir is not None:
        raise UserError(f"run_dir={first.run_dir}: a sweep makes one directory a point; name=WORD names the sweep's")
    sweep = Sweep(Path(first.output_dir) / "sweeps" / sweep_name(command, first, keys))
    points = sweep.add_points([(cfg, own, point_name(own, keys)) for cfg, own in zip(configs, words, strict=True)], first.rank_by)
    if len(points) < len(words):
        log.info("%-14s %d points would train the same thing as another and are left out", "points", len(words) - len(points))
    return sweep, points, first.rank_by


def sweep_name(command: Command, cfg: DictConfig, keys: Sequence[str]) -> str:
    """`name`, or model, data, preset and swept keys, so that the same command finds the same directory again.

    Other words that are not swept are hashed into six digits: other settings are another sweep, other values of a swept key are not.
    """
    if cfg.name and "name" not in keys:
        return plain_name(cfg.name)
    typed = {w.lstrip("+").split("=", 1)[0]: w.lstrip("+") for w in command.overrides}
    parts = [] if "model" in keys or "model.path" in keys else [Path(cfg.model.path.split(":")[-1]).name]
    parts += [] if "data" in keys else [cfg.data.name]
    parts += [typed["experiment"].split("=", 1)[1]] if "experiment" in typed and "experiment" not in keys else []
    fixed = sorted(word for key, word in typed.items() if key not in keys and key not in NOT_IN_NAME)
    fixed += [f"{command.config_dir or ''} {command.config_name}"] if command.config_dir or command.config_name != "config" else []
    parts += sorted(keys) + ([hashlib.sha256("\n".join(fixed).encode()).hexdigest()[:6]] if fixed else [])
    return "_".join(plain_name(p) for p in parts if p)[:120]


def run_here(jobs: list[PointJob]) -> list[PointResult]:
    """Run points one after another in this process, which imports, loads and prepares once.

    A point that another process trains now (the same command, started twice) is left to it, and its result is read at the end.
    """
    if not jobs:
        return []
    model = OmegaConf.create(jobs[0].config).model
    imported = import_while_hashing("transformers.trainer", "peft", model=model.get("path"))
    from .context import SweepContext

    return run_with(SweepContext(), jobs, imported)


def run_with(context: SweepContext, jobs: list[PointJob], imported: bool = False) -> list[PointResult]:
    """The same with a context. imported: this command had to import the libraries, which counts for its first point."""
    results, later = [], []
    with listening(context.listener) as listener:
        for n, job in enumerate(jobs):
            log.info("\n%-14s %d of %d  %s", "point", n + 1, len(jobs), " ".join(job.words))
            results.append(run_point(job, context.with_changes(listener=listener, imported=imported and n == 0), wait=False))
            context.end_point()
            if results[-1]["status"] == "running":
                later.append(n)
        for n in later:
            log.info("%-14s waiting for the process that trains %s", "point", results[n]["run"])
            results[n] = run_point(jobs[n], context.with_changes(listener=listener))
            context.end_point()
    return results


def show_leaderboard(path: Path, logger: Any = None) -> None:
    """The table in the terminal, its files beside the runs, and the same for the logger of the sweep's points: the config of one; None: for none."""
    if not any(path.glob("*/snapshot.yaml")):
        return
    board = leaderboard.read(path)
    terminal.show(terminal.leaderboard_table(board))
    for file in leaderboard_page.write(path, board):
        log.info("%-14s %s", "leaderboard", file)
    if logger is not None and isinstance(built := build(logger, "logger"), Logger):
        built.leaderboard(path, as_board(board))


def as_board(found: leaderboard.Leaderboard) -> Board:
    """The columns of leaderboard.csv, with numbers as such."""

    def value(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    columns, *rows = csv.reader(io.StringIO(leaderboard_page.table(found)))
    return Board(columns, [list(map(value, row)) for row in rows], leaderboard_page.markdown(found))
