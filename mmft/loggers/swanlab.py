"""SwanLab: log online, to a local dashboard or to offline files; falls back to offline without an account or a network."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.records import AnswerRecord
from ..reports.pictures import row_pictures
from .base import Board, Logger, grouped, sample_text, warn
from .outside import sweep_of
from .tensorboard import side_by_side

MODES = ("online", "local", "offline", "disabled")
_SECRET = re.compile(r"(token|secret|passw(or)?d|api_?key|credential|webhook)s?$", re.IGNORECASE)


@dataclass(kw_only=True)
class SwanLab(Logger):
    """Writes RUN/swanlab through swanlab.init/log/finish. mode, project, ...: arguments of swanlab.init.

    online without an API key or a reachable service, and local without the dashboard package, become offline, and one line
    says so. Raises UserError for another mode.
    """

    mode: str = "online"
    project: str | None = "mmft"
    workspace: str | None = None
    experiment_name: str | None = None
    picture_size: int = 256
    _run: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"logger mode={self.mode}: must be one of {', '.join(MODES)}")

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        mode, why = self.usable_mode()
        if why:
            warn(f"SwanLab logs {mode} instead of {self.mode}: {why}")
        try:
            self._run = self._init(mode, run_dir, name, config)
        except Exception as error:
            if mode != "online":
                raise
            reason = " ".join(str(error).split())
            warn(f"SwanLab logs offline instead of online: {reason} Send the run later with `swanlab sync`.")
            for left in (run_dir / "swanlab").glob("run-*"):
                with contextlib.suppress(OSError):  # only the empty directory of the failed start can be removed
                    left.rmdir()
            self._run = self._init("offline", run_dir, name, config)

    def usable_mode(self) -> tuple[str, str]:
        """(mode that works here, why it is not the configured one or ""). Contacts no service."""
        if self.mode == "online":
            from swanlab.sdk.internal.settings import create_settings

            if not create_settings().api_key:  # from SWANLAB_API_KEY, a settings file, or `swanlab login`
                return "offline", "nobody is logged in (`swanlab login`, or SWANLAB_API_KEY); send the run later with `swanlab sync`"
        if self.mode == "local" and importlib.util.find_spec("swanboard") is None:
            return "offline", "the dashboard is not installed (pip install 'swanlab[dashboard]')"
        return self.mode, ""

    def _init(self, mode: str, run_dir: Path, name: str, config: Mapping[str, Any]) -> Any:
        import swanlab

        settings = swanlab.Settings(
            interactive=False,  # a run must not wait at a prompt
            terminal={"proxy_type": "none"},  # it would wrap the streams of the progress bar
            probe={"git": False},  # a remote's address may contain a password; env.json has the commit
        )
        log_dir = run_dir / "swanlab"
        log_dir.mkdir(parents=True, exist_ok=True)
        return swanlab.init(
            mode=mode, log_dir=str(log_dir), project=self.project, workspace=self.workspace, reinit=True,
            name=self.experiment_name or name, group=sweep_of(run_dir), config=without_secrets(config), settings=settings,
        )  # fmt: skip

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({grouped(k): v for k, v in values.items()}, step=step)

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        import swanlab

        images, texts = [], []
        for row in rows:
            opened = [p for p in row_pictures(row, self.picture_size) if p is not None]
            if opened:
                caption = f"{row.get('prediction', '')}\n(reference: {(row.get('references') or [''])[0]})"
                images.append(swanlab.Image(side_by_side(opened), caption=caption))
            texts.append(swanlab.Text(sample_text(row), caption=str(row.get("id", ""))))
        self._run.log({f"{tag}/pictures": images, f"{tag}/texts": texts} if images else {f"{tag}/texts": texts}, step=step)

    def write_leaderboard(self, board: Board) -> None:
        import swanlab

        self._run.log({"leaderboard": swanlab.Text(board.markdown)}, step=0)

    def close(self, status: str) -> None:
        run, self._run = self._run, None
        if run is None:
            return
        if status in ("done", "finished", "complete", "completed", "success"):
            run.finish(state="success")
        elif status in ("interrupted", "aborted"):
            run.finish(state="aborted", error=status)
        else:
            run.finish(state="crashed", error=status)


def without_secrets(value: Any, key: str = "") -> Any:
    """Plain values in which the value of every key that names a secret (token, api_key, password, ...) is replaced by ***."""
    if key and value and _SECRET.search(key) and isinstance(value, str):
        return "***"
    if isinstance(value, dict):
        return {k: without_secrets(v, str(k)) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(v, key) for v in value]
    return value
