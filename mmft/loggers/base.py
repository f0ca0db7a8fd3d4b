"""Logger: the interface that training calls, and the base class that keeps a failing logger from stopping a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..common.records import AnswerRecord
from .hardware import Hardware


@dataclass(frozen=True)
class Board:
    """The leaderboard of a sweep. rows: numbers, and texts for everything else. markdown: the same as a table in Markdown, with its notes."""

    columns: Sequence[str]
    rows: Sequence[Sequence[float | str]]
    markdown: str


class RunLogger(Protocol):
    """What training calls: start once, scalars and samples during the run, finish once. No method raises."""

    def start(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        """Begin a run. run_dir: exists. config: plain values."""
        ...

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Log numbers at an optimiser step, under the Trainer's names (loss, eval_loss, ...)."""
        ...

    def samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        """Log answers at a step, under a tag ("held out", "training")."""
        ...

    def finish(self, status: str) -> None:
        """End the run. status: finished, failed, interrupted, preempted or pruned."""
        ...

    def leaderboard(self, folder: Path, board: Board) -> None:
        """Log a sweep's leaderboard as a run of its own, between no other calls. folder: of the sweep."""
        ...


@dataclass(kw_only=True)
class Logger:
    """Logs nothing (`logger=none`); base class of the others, which override `open`, `write_scalars`, `write_samples`, `write_leaderboard`,
    `close`.

    If one of these hooks raises, one line on standard error says so, and the logger is off from then on.
    """

    hardware: bool = True  # add hardware/* to the scalars, once per step
    _sampler: Hardware = field(default_factory=Hardware, init=False, repr=False)
    _off: bool = field(default=False, init=False, repr=False)
    _hardware_step: int | None = field(default=None, init=False, repr=False)

    def start(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        self.guarded(self.open, Path(run_dir), name, config)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """See RunLogger. Values that are not numbers, which the Trainer's logs contain, are left out."""
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if self.hardware and not self._off and self._hardware_step != step:
            self._hardware_step = step
            numbers |= {f"hardware/{k}": v for k, v in self._sampler.read().items()}
        if numbers:
            self.guarded(self.write_scalars, int(step), numbers)

    def samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        if rows:
            self.guarded(self.write_samples, int(step), rows, tag)

    def finish(self, status: str) -> None:
        """See RunLogger. A logger that failed is closed, too."""
        self._off, was_off = False, self._off
        if was_off:
            with contextlib.suppress(Exception):  # its failure was reported before
                self.close(status)
        else:
            self.guarded(self.close, status)
        self._off = True

    def leaderboard(self, folder: Path, board: Board) -> None:
        """See RunLogger."""
        self.start(folder, f"{folder.name} leaderboard", {})
        self.guarded(self.write_leaderboard, board)
        self.finish("finished")

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        """Hook of start."""

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Hook of scalars."""

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        """Hook of samples."""

    def write_leaderboard(self, board: Board) -> None:
        """Hook of leaderboard."""

    def close(self, status: str) -> None:
        """Hook of finish; also called after a failure, also when `open` failed."""

    def guarded(self, hook: Callable[..., None], *arguments: object) -> None:
        if self._off:
            return
        try:
            hook(*arguments)
        except Exception as error:  # a logging library may raise anything; the training continues
            self._off = True
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"{type(self).__name__} logger is off: {reason}")


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"mmft: {text}", file=sys.stderr, flush=True)


def grouped(name: str) -> str:
    """The Trainer's name as group/name, by which loggers arrange charts: eval_loss -> eval/loss, loss -> train/loss."""
    for prefix in ("eval_", "test_", "base_"):
        if name.startswith(prefix):
            return f"{prefix[:-1]}/{name[len(prefix):]}"
    return name if name.startswith("hardware/") else f"train/{name}"


def sample_text(row: AnswerRecord) -> str:
    """A row as Markdown: prompt, references, prediction, each as a code block, so that no text is interpreted as Markdown."""
    parts: list[tuple[str, Sequence[str | None]]]
    parts = [("prompt", [row.get("prompt")]), ("reference", row.get("references") or []), ("prediction", [row.get("prediction")])]
    return "\n\n".join(f"**{name}**\n\n{_fenced(str(text))}" for name, texts in parts for text in texts if text is not None)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:  # a fence in the text must not end the block
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
