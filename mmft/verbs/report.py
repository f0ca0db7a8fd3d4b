"""`mmft report run=DIR|SWEEP`: write the reports again from the run's files, without model or data set."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from omegaconf import DictConfig

from ..common.errors import UserError, nearest
from ..common.records import Summary
from ..runs.directory import Run

log = logging.getLogger("mmft")

RUN_FILES = ("snapshot.yaml", "summary.json", "metrics.jsonl", "env.json")  # a directory with any of them is a run


@dataclass
class Report:
    """The keys of conf/task/report.yaml. `run` may be unfinished, failed or moved, or a folder of runs."""

    run: str
    by: str | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> list[Path]:
        """Write the reports and return their paths. Raises UserError for a folder without a run."""
        folder = Path(self.run)
        if not folder.is_dir():
            siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
            raise UserError(f"run={self.run}: no such directory.{nearest(folder.name, siblings)}")
        single = any((folder / name).is_file() for name in RUN_FILES)
        if single and self.by is not None:
            raise UserError(f"by={self.by}: {self.run} is one run; ranking needs a folder of runs")
        try:
            written = self._report_run(folder) if single else self._report_runs(folder)
        except OSError as error:
            raise UserError(f"run={self.run}: the report cannot be written: {error.strerror or error}") from None
        Run(folder).record("report", overrides, written)
        for path in written:
            log.info("report         %s", path)
        return written

    def _report_run(self, folder: Path) -> list[Path]:
        from ..common.files import read_json
        from ..reports import terminal
        from ..reports.loss_curve import write_curve
        from ..reports.run_markdown import write_markdown
        from ..reports.run_page import write_report

        curve = write_curve(folder)
        summary = cast("Summary", read_json(folder / "summary.json"))
        tables = terminal.results_tables(summary) if summary.get("metrics") or summary.get("base_metrics") else []
        terminal.show(*tables, *([terminal.summary_table(summary)] if summary else []))
        return [write_report(folder), write_markdown(folder), *([curve] if curve else [])]

    def _report_runs(self, folder: Path) -> list[Path]:
        from ..reports import leaderboard, leaderboard_page, terminal

        board = leaderboard.read(folder, self.by)
        terminal.show(terminal.leaderboard_table(board))
        return leaderboard_page.write(folder, board)
