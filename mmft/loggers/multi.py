"""Multi: several loggers as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.records import AnswerRecord
from .base import Board, Logger, RunLogger


@dataclass(kw_only=True)
class Multi(Logger):
    """Calls each of `loggers` (name -> logger); if one of them fails, the others continue."""

    hardware: bool = False  # each of them takes its own readings
    loggers: Mapping[str, RunLogger] = field(default_factory=dict)

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        for logger in self.loggers.values():
            logger.start(run_dir, name, config)

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for logger in self.loggers.values():
            logger.scalars(step, values)

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        for logger in self.loggers.values():
            logger.samples(step, rows, tag)

    def leaderboard(self, folder: Path, board: Board) -> None:
        for logger in self.loggers.values():
            self.guarded(logger.leaderboard, folder, board)

    def close(self, status: str) -> None:
        for logger in self.loggers.values():
            logger.finish(status)
