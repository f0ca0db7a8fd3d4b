"""The parsed command line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Command:
    """overrides: the words key=value, with `task=VERB` for a verb. hydra: Hydra's flags with their values, as typed."""

    overrides: list[str] = field(default_factory=list)
    config_dir: str | None = None
    config_name: str = "config"
    multirun: bool = False
    help: bool = False
    json: bool = False
    completion: str | None = None
    hydra: list[str] = field(default_factory=list)
    verb: str | None = None
