"""Trackio: log to a local database that `trackio show` displays, or to a Space of Hugging Face."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.records import AnswerRecord
from .base import Board, Logger, grouped
from .outside import COLUMNS, answer_rows, quiet, require, sweep_of
from .swanlab import without_secrets


@dataclass(kw_only=True)
class Trackio(Logger):
    """project, space_id: arguments of trackio.init. folder: of the local database, None: Trackio's own, where `trackio show` looks for it.

    A sweep is a group; answers are tables with pictures. Raises UserError without the package.
    """

    project: str = "mmft"
    space_id: str | None = None
    folder: str | None = None
    picture_size: int = 256
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        require("trackio", "trackio")
        if self.folder is not None:
            os.environ["TRACKIO_DIR"] = str(Path(self.folder).absolute())  # read when the package is imported

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        with quiet("trackio", "httpx"):
            import trackio

            self._run = trackio.init(
                self.project, name=name, group=sweep_of(run_dir), space_id=self.space_id, config=without_secrets(dict(config)), embed=False,
                auto_log_gpu=False, auto_log_cpu=False,  # the hardware scalars are mmft's own
            )  # fmt: skip

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        with quiet("trackio"):
            self._run.log({grouped(k): v for k, v in values.items()}, step=step)

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        with quiet("trackio"):
            import trackio

            data = [[i, trackio.Image(picture) if picture is not None else None, *texts] for i, picture, *texts in answer_rows(rows, self.picture_size)]
            self._run.log({f"{tag}/answers": trackio.Table(columns=list(COLUMNS), data=data)}, step=step)

    def write_leaderboard(self, board: Board) -> None:
        with quiet("trackio"):
            import trackio

            self._run.log({"leaderboard": trackio.Table(columns=list(board.columns), data=[list(row) for row in board.rows])}, step=0)

    def close(self, status: str) -> None:
        run, self._run = self._run, None
        if run is not None:
            with quiet("trackio"):
                import trackio

                trackio.finish()  # also lets go of the run, which would be finished once more, with a notice, when Python ends
