"""The base logger: what the trainer calls, and the promise that a failing logger never stops a run."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .hardware import Hardware


@dataclass(kw_only=True)
class Logger:
    """A logger that logs nothing (`logger=none`), and the base of the others.

    A run calls start once, scalars and samples as it goes, finish once. A logger overrides any of the four hooks
    `open`, `write_scalars`, `write_samples`, `close`; whatever a hook raises is answered with one line on standard
    error, and the logger is off from then on.
    """

    hardware: bool = True  # add hardware/* to the scalars, once a step
    _sampler: Hardware = field(default_factory=Hardware, init=False, repr=False)
    _off: bool = field(default=False, init=False, repr=False)
    _measured: int | None = field(default=None, init=False, repr=False)

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        """Begin a run: its directory (exists), its name, its config as plain values."""
        self._guard(self.open, Path(run_dir), name, config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log numbers at an optimiser step, named as the Trainer names them (loss, eval_loss, ...).

        Values that are no numbers are left out: the Trainer's logs hold some.
        """
        kept = {k: float(v) for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if self.hardware and not self._off and self._measured != step:
            self._measured = step
            kept |= {f"hardware/{k}": v for k, v in self._sampler.read().items()}
        if kept:
            self._guard(self.write_scalars, int(step), kept)

    def samples(self, step: int, rows: list[dict[str, Any]], tag: str) -> None:
        """Log evaluation rows (root, images, prompt, references, prediction) at a step, under a tag ("base", "samples")."""
        if rows:
            self._guard(self.write_samples, int(step), rows, tag)

    def finish(self, status: str) -> None:
        """End the run: "done", or what ended it. A logger that failed is closed too."""
        self._off, was_off = False, self._off
        if was_off:
            with contextlib.suppress(Exception):  # it has said that it failed
                self.close(status)
        else:
            self._guard(self.close, status)
        self._off = True

    def open(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        """Hook of start."""

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        """Hook of scalars."""

    def write_samples(self, step: int, rows: list[dict[str, Any]], tag: str) -> None:
        """Hook of samples."""

    def close(self, status: str) -> None:
        """Hook of finish; also called after a failure, also when `open` failed."""

    def _guard(self, hook, *arguments) -> None:
        if self._off:
            return
        try:
            hook(*arguments)
        except Exception as error:  # whatever a logging library raises, the training goes on
            self._off = True
            reason = " ".join(str(error).split()) or type(error).__name__
            warn(f"{type(self).__name__} logger is off: {reason}")


def warn(text: str) -> None:
    """One line on standard error."""
    print(f"mmft: {text}", file=sys.stderr, flush=True)


def grouped(name: str) -> str:
    """The Trainer's name as a group and a name, by which loggers arrange charts: eval_loss -> eval/loss, loss -> train/loss."""
    for prefix in ("eval_", "test_", "base_"):
        if name.startswith(prefix):
            return f"{prefix[:-1]}/{name[len(prefix):]}"
    return name if "/" in name else f"train/{name}"


def sample_text(row: dict[str, Any]) -> str:
    """A row as Markdown: prompt, reference, prediction. The texts are shown as they are, in code blocks."""
    parts = [("prompt", [row.get("prompt")]), ("reference", row.get("references") or []), ("prediction", [row.get("prediction")])]
    return "\n\n".join(f"**{name}**\n\n{_fenced(str(text))}" for name, texts in parts for text in texts if text is not None)


def _fenced(text: str) -> str:
    fence = "```"
    while fence in text:  # a text that holds a fence must not end it
        fence += "`"
    return f"{fence}\n{text}\n{fence}"
