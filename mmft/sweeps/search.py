"""`mmft -m hydra/sweeper=optuna ...`: from a command to a search, its points trained like those of any sweep."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mmft.config.plain import to_plain

from ..config import compose, sweep_overrides
from ..config.build import build
from ..config.command import Command
from . import run as sweeping
from .directory import Point, Sweep, point_name

log = logging.getLogger("mmft")


def search(command: Command, settings: Any, launch: sweeping.Launcher) -> list[str]:
    """Run a search; one line for each failed point. `settings`: hydra.sweeper. Errors raised: UserError before anything is written."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from ..system.console import set_up_logging
    from .optuna_study import library

    set_up_logging()
    library()
    typed = {word.lstrip("+~").split("=", 1)[0]: word for word in command.overrides}
    # a preset's space, with what is typed in its place
    asked = [*(f"{key}={value}" for key, value in flat(to_plain(settings.get("params")) or {}) if key not in typed), *command.overrides]
    sweep_overrides.check_sweep(ends(asked), command.config_dir, command.config_name)
    first = compose.compose(sweep_overrides.first_values(asked), command.config_dir, command.config_name)
    space = [o for o in (OverridesParser.create().parse_override(word) for word in asked if "=" in word) if o.is_sweep_override()]
    fixed = [word for word in asked if word.split("=", 1)[0] not in {o.get_key_element() for o in space}]
    keys = [o.key_or_group for o in space]
    home = Sweep(Path(first.output_dir) / "sweeps" / sweeping.sweep_name(command, first, keys))
    study = build(settings, "hydra.sweeper", sweep_dir=home.path, objective=first.objective, space=space)
    log.info("%-14s %s", "search", home.path)

    def enter(words: list[str]) -> Point:
        own = [*fixed, *words]
        return home.enter([(compose.compose(own, command.config_dir, command.config_name), own, point_name(own, keys))], first.objective)[0]

    outcomes = study.run(enter, lambda points: launch([sweeping.arguments(home, p) for p in points]))
    sweeping.leaderboard(home.path, first.objective)
    failed = {r["run"]: r for r in outcomes if r["status"] not in ("finished", "pruned")}
    return [f"{r['run']}: {r['reason'] or r['status']}" for r in failed.values()]


def flat(params: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """`lora.r: choice(1,2)` and `lora: {r: choice(1,2)}` are the same."""
    pairs: list[tuple[str, str]] = []
    for key, value in params.items():
        pairs += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def ends(words: list[str]) -> list[str]:
    """Intervals as their two ends, by which a wrong kind of value is found before the first point."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found = []
    for word in words:
        try:
            parsed = OverridesParser.create().parse_override(word)
            found.append(f"{word.split('=', 1)[0]}={parsed.value().start},{parsed.value().end}" if parsed.is_interval_sweep() else word)
        except Exception:  # unreadable: compose answers it
            found.append(word)
    return found
