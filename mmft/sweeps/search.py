"""Run a search with Optuna: its points are trained like those of any sweep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..config import compose, sweep_overrides
from ..config.build import build
from ..config.command import Command
from ..config.plain import to_plain
from ..config.validate import score_directions
from ..system.console import set_up_logging
from .directory import Point, Sweep, point_name
from .optuna_study import library
from .points import Launcher, job_of
from .run import show_leaderboard, sweep_name

log = logging.getLogger("mmft")

PARENTS = ("lora.start", "model.adapters")  # keys that name runs


def run_search(command: Command, settings: DictConfig, launch: Launcher) -> list[str]:
    """Run a search; returns one line for each failed point. settings: hydra.sweeper. Raises UserError before anything is written."""
    set_up_logging()
    library()
    typed = {word.lstrip("+~").split("=", 1)[0]: word for word in command.overrides}
    # the search space of a preset, where nothing else was typed
    asked = [*(f"{key}={value}" for key, value in flat(to_plain(settings.get("params")) or {}) if key not in typed), *command.overrides]
    sweep_overrides.check_sweep(interval_ends(asked), command.config_dir, command.config_name)
    first = compose.compose(sweep_overrides.first_values(asked), command.config_dir, command.config_name)
    named = {key for key in PARENTS if OmegaConf.select(first, key)}
    if named:
        from ..runs.parents import resolve_names

        resolve_names(first)
    space = [override for override in map(sweep_overrides.parse_sweep, asked) if override is not None]
    searched = {o.get_key_element() for o in space}
    fixed = [word for word in asked if word.split("=", 1)[0] not in searched]
    keys = [o.key_or_group for o in space]
    sweep = Sweep(Path(first.output_dir) / "sweeps" / sweep_name(command, first, keys))
    study = build(settings, "hydra.sweeper", sweep_dir=sweep.path, objective=first.rank_by, space=space, directions=score_directions(to_plain(first)))
    log.info("%-14s %s", "search", sweep.path)

    def add_point(words: list[str]) -> Point:
        whole = [*fixed, *words]
        cfg = compose.compose(whole, command.config_dir, command.config_name)
        for key in named - searched:  # a short name such as `last` stands for the run that it meant at the start
            OmegaConf.update(cfg, key, OmegaConf.select(first, key))
        return sweep.add_points([(cfg, whole, point_name(whole, keys))], first.rank_by)[0]

    results = study.run(add_point, lambda points: launch([job_of(sweep, p) for p in points]))
    show_leaderboard(sweep.path, to_plain(first.logger))
    failed = {r["run"]: r for r in results if r["status"] not in ("finished", "pruned")}
    return [f"{r['run']}: {r['reason'] or r['status']}" for r in failed.values()]


def flat(params: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """(dotted key, value) of nested mappings: `lora.r: choice(1,2)` and `lora: {r: choice(1,2)}` are the same."""
    pairs: list[tuple[str, str]] = []
    for key, value in params.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def interval_ends(words: list[str]) -> list[str]:
    """Each interval as its two ends, so that a wrong kind of value is found before the first point."""
    bounds = []
    for word in words:
        override = sweep_overrides.parse_sweep(word)
        interval = override.value() if override is not None and override.is_interval_sweep() else None
        bounds.append(word if interval is None else f"{word.split('=', 1)[0]}={interval.start},{interval.end}")
    return bounds
