"""`mmft report run=DIR|SWEEP`: the reports again, from the files alone; no model, no data set."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError, nearest
from ..runs.directory import Run

log = logging.getLogger("mmft")

MARKS = ("snapshot.yaml", "summary.json", "metrics.jsonl", "env.json")  # any of them makes a directory a run's


@dataclass
class Report:
    """`run` may be unfinished, failed, or moved since. Errors raised: UserError for a folder without a run."""

    run: str
    by: str | None = None

    def __call__(self, cfg: Any, overrides: list[str]) -> list[Path]:
        folder = Path(self.run)
        if not folder.is_dir():
            beside = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise UserError(f"run={self.run}: no such directory.{nearest(folder.name, beside)}")
        single = any((folder / name).is_file() for name in MARKS)
        if single and self.by is not None:
            raise UserError(f"by={self.by}: {self.run} is one run; ranking needs a folder of runs")
        try:
            wrote = self.one(folder) if single else self.several(folder)
        except OSError as error:
            raise UserError(f"run={self.run}: the report cannot be written: {error.strerror or error}") from None
        Run(folder).record("report", overrides, wrote)
        for path in wrote:
            log.info("report         %s", path)
        return wrote

    def one(self, folder: Path) -> list[Path]:
        from ..common.files import read_json
        from ..reports import terminal
        from ..reports.curve import write_curve
        from ..reports.markdown import write_markdown
        from ..reports.page import write_report

        curve = write_curve(folder)
        summary = read_json(folder / "summary.json")
        tables = [terminal.results_table(summary)] if summary.get("metrics") or summary.get("base_metrics") else []
        terminal.show(*tables, *([terminal.summary_table(summary)] if summary else []))
        return [write_report(folder), write_markdown(folder), *([curve] if curve else [])]

    def several(self, folder: Path) -> list[Path]:
        from ..reports import leaderboard, terminal

        board = leaderboard.read(folder, self.by)
        terminal.show(terminal.leaderboard_table(board))
        return leaderboard.write(folder, board)
