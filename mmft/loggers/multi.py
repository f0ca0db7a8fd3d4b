"""Several loggers as one."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .base import Logger


@dataclass(kw_only=True)
class Multi(Logger):
    """Passes everything on to `loggers` (name -> Logger); one of them failing leaves the others running."""

    hardware: bool = False  # each of them reads its own
    loggers: dict[str, Logger] = field(default_factory=dict)

    def open(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        for logger in self.loggers.values():
            logger.start(run_dir, name, config)

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        for logger in self.loggers.values():
            logger.scalars(step, values)

    def write_samples(self, step: int, rows: list[dict[str, Any]], tag: str) -> None:
        for logger in self.loggers.values():
            logger.samples(step, rows, tag)

    def close(self, status: str) -> None:
        for logger in self.loggers.values():
            logger.finish(status)
