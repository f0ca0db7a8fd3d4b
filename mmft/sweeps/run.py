"""`mmft -m key=a,b ...`: compose every point once, train those that are not finished, end with a leaderboard."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ..common.errors import UserError
from ..config import sweep_overrides
from ..config.command import Command
from ..runs.directory import plain_name
from .directory import Point, Sweep, point_name, run_point

log = logging.getLogger("mmft")

# (config as yaml, words, sweep directory) of the points to run -> what run_point returned for each
Launcher = Callable[[list[tuple[str, list[str], str]]], list[dict[str, Any]]]
NOT_IN_NAME = ("output_dir", "name", "logger", "objective", "model", "data", "experiment", "task")  # words that leave the sweep's name as it is


def sweep(command: Command, launch: Launcher) -> list[str]:
    """Run a sweep; one line for each failed point. Errors raised: UserError, before anything is written."""
    from ..system.console import set_up_logging

    set_up_logging()
    home, points, objective = plan(command)
    todo = [p for p in points if home.status(p) != "finished"]
    log.info("%-14s %s", "sweep", home.path)
    log.info("%-14s %d, %d of them finished already", "points", len(points), len(points) - len(todo))
    results = launch([arguments(home, p) for p in todo])
    failed = [r for r in results if r["status"] != "finished"]
    leaderboard(home.path, objective)
    return [f"{r['run']}: {r['reason'] or r['status']}" for r in failed]


def plan(command: Command) -> tuple[Sweep, list[Point], str]:
    """The sweep's directory and this command's points, every config composed and checked. Errors raised: UserError."""
    words, keys = sweep_overrides.expand(command.overrides, command.config_dir)
    configs = sweep_overrides.compose_each(words, command.config_dir, command.config_name)
    first = configs[0]
    if first.run_dir is not None:
        raise UserError(f"run_dir={first.run_dir}: a sweep makes one directory a point; name=WORD names the sweep's")
    home = Sweep(Path(first.output_dir) / "sweeps" / sweep_name(command, first, keys))
    wanted = [(cfg, own, point_name(own, keys)) for cfg, own in zip(configs, words, strict=True)]
    points = home.enter(wanted, first.objective)
    if len(points) < len(wanted):
        log.info("%-14s %d points would train the same thing as another and are left out", "points", len(wanted) - len(points))
    return home, points, first.objective


def sweep_name(command: Command, cfg: Any, keys: list[str]) -> str:
    """`name`, or model, data, preset and swept keys, so that the same command finds the same directory again.

    What else was typed and is not swept is hashed into six digits: other settings are another sweep, other values are not.
    """
    if cfg.name and "name" not in keys:
        return plain_name(cfg.name)
    given = {w.lstrip("+").split("=", 1)[0]: w.lstrip("+") for w in command.overrides}
    parts = [] if "model" in keys or "model.path" in keys else [Path(cfg.model.path.split(":")[-1]).name]
    parts += [] if "data" in keys else [cfg.data.name]
    parts += [given["experiment"].split("=", 1)[1]] if "experiment" in given and "experiment" not in keys else []
    fixed = sorted(word for key, word in given.items() if key not in keys and key not in NOT_IN_NAME)
    fixed += [f"{command.config_dir or ''} {command.config_name}"] if command.config_dir or command.config_name != "config" else []
    parts += sorted(keys) + ([hashlib.sha256("\n".join(fixed).encode()).hexdigest()[:6]] if fixed else [])
    return "_".join(plain_name(p) for p in parts if p)[:120]


def arguments(home: Sweep, point: Point) -> tuple[str, list[str], str]:
    """A point as `run_point` takes it: plain text, so that any launcher can carry it to another process or machine."""
    return OmegaConf.to_yaml(OmegaConf.create(point.config)), point.words, home.path.as_posix()


def here(points: list[tuple[str, list[str], str]], shared: Any = None) -> list[dict[str, Any]]:
    """One point after the other in this process, which imports, loads and prepares once.

    A point that another process trains now (the same command, started twice) is left to it and asked for at the end.
    """
    from ..system.signals import listening
    from .shared_base import Shared

    shared = shared or Shared()
    results, later = [], []
    with listening(shared.running):
        for n, point in enumerate(points):
            log.info("\n%-14s %d of %d  %s", "point", n + 1, len(points), " ".join(point[1]))
            results.append(run_point(*point, shared=shared, wait=False))
            shared.end_point()
            if results[-1]["status"] == "running":
                later.append(n)
        for n in later:
            log.info("%-14s waiting for the process that trains %s", "point", results[n]["run"])
            results[n] = run_point(*points[n], shared=shared)
            shared.end_point()
    return results


def leaderboard(path: Path, objective: str) -> None:
    """The table in the terminal, and its files beside the runs."""
    from ..reports import leaderboard as board
    from ..reports import terminal

    if not any(path.glob("*/snapshot.yaml")):
        return
    read = board.read(path)
    terminal.show(terminal.leaderboard_table(read))
    for file in board.write(path, read):
        log.info("%-14s %s", "leaderboard", file)
