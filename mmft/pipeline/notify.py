"""A command at the end of a run, from the environment variable MMFT_NOTIFY. No file can name it: a config cannot start programs."""

from __future__ import annotations

import os
import shlex
import subprocess

from ..loggers.base import warn
from ..runs.directory import Run
from ..system.distributed import is_main

VARIABLE = "MMFT_NOTIFY"  # MMFT_NOTIFY="notify-send mmft"
SECONDS = 60  # a command that hangs is ended


def notify(run: Run, status: str, loss: object) -> None:
    """Start the command with the words `NAME STATUS`, and MMFT_RUN, MMFT_STATUS and MMFT_LOSS in its environment.

    A command that fails changes nothing but for one line on standard error.
    """
    command = os.environ.get(VARIABLE, "")
    if not command.strip() or not is_main():
        return
    facts = {"MMFT_RUN": str(run.path.absolute()), "MMFT_STATUS": status, "MMFT_LOSS": "" if loss is None else str(loss)}
    try:
        words = shlex.split(command)
        done = subprocess.run([*words, run.name, status], env={**os.environ, **facts}, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=False)
        problem = f"it ended with code {done.returncode}: {' '.join(done.stderr.split())[:200]}" if done.returncode else ""
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        problem = getattr(error, "strerror", None) or str(error)
    if problem:
        warn(f"{VARIABLE}={command}: {problem}")
