"""What was typed: the overrides and flags of one command."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Command:
    """What was typed: overrides (with `task=VERB` for a verb) and flags."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str = "config"
    multirun: bool = False
    help: bool = False
    hydra: list[str] = field(default_factory=list)  # Hydra's flags with their values, as typed
    verb: str | None = None
