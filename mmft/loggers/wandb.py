"""Weights & Biases: log online or to offline files; falls back to offline without an account or a network."""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from ..common.errors import UserError
from ..common.records import AnswerRecord
from .base import Board, Logger, grouped, warn
from .outside import COLUMNS, REPORT, answer_rows, require, sweep_of
from .swanlab import without_secrets

MODES = ("online", "offline", "disabled")
HOST = "https://api.wandb.ai"


@dataclass(kw_only=True)
class Wandb(Logger):
    """Writes RUN/wandb through wandb.init and a run's log and finish. mode, project, entity: arguments of wandb.init.

    Scalars have the step as their x axis; answers are tables with pictures; a sweep is a group; the report is attached at the end. online
    without a key or a reachable service becomes offline, and one line says so. Raises UserError for another mode, and without the package.
    """

    mode: str = "online"
    project: str = "mmft"
    entity: str | None = None
    group: str | None = None
    picture_size: int = 256
    _run: Any = field(default=None, init=False, repr=False)
    _dir: Path = field(default=Path(), init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"logger.mode={self.mode}: must be one of {', '.join(MODES)}")
        require("wandb", "wandb")

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self._dir = run_dir
        mode = self.mode
        if mode == "online" and not has_key():
            mode = "offline"
            warn("Weights & Biases logs offline instead of online: nobody is logged in (`wandb login`, or WANDB_API_KEY); send the run later with `wandb sync`")
        try:
            self._run = self._init(mode, name, config)
        except Exception as error:
            if mode != "online":
                raise
            warn(f"Weights & Biases logs offline instead of online: {' '.join(str(error).split())}; send the run later with `wandb sync`")
            self._run = self._init("offline", name, config)
        self._run.define_metric("*", step_metric="step")  # a resumed run logs steps again, which the service's own step would refuse

    def _init(self, mode: Any, name: str, config: Mapping[str, Any]) -> Any:
        import wandb

        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it would advertise Weave on stderr if huggingface_hub's client is imported
        settings = wandb.Settings(
            silent=True, quiet=True, console="off", disable_git=True, disable_code=True, save_code=False, init_timeout=30,
            x_disable_stats=True,  # the hardware scalars are mmft's own
            x_disable_meta=True,  # it holds the whole command line, and the names of host and user
        )  # fmt: skip
        return wandb.init(
            mode=mode, dir=str(self._dir), project=self.project, entity=self.entity, name=name, group=self.group or sweep_of(self._dir),
            config=without_secrets(dict(config)), settings=settings, reinit="create_new",
        )  # fmt: skip

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **{grouped(k): v for k, v in values.items()}})

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        import wandb

        data = [[i, wandb.Image(picture) if picture is not None else None, *texts] for i, picture, *texts in answer_rows(rows, self.picture_size)]
        self._run.log({"step": step, f"{tag}/answers": wandb.Table(columns=list(COLUMNS), data=data)})

    def write_leaderboard(self, board: Board) -> None:
        import wandb

        self._run.log({"leaderboard": wandb.Table(columns=list(board.columns), data=[list(row) for row in board.rows], allow_mixed_types=True)})

    def close(self, status: str) -> None:
        import wandb

        run, self._run = self._run, None
        if run is None:
            return
        run.summary["status"] = status
        if status == "finished" and (self._dir / REPORT).is_file():
            run.log({"report": wandb.Html((self._dir / REPORT).read_text(encoding="utf-8"))})
        run.finish(exit_code=0 if status == "finished" else 1)


def has_key() -> bool:
    """Whether a key is in the environment or in the file of `wandb login`. Contacts no service."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL") or HOST).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
