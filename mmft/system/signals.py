"""TERM, INT, USR1 and USR2: finish the step, save, mark the run preempted, exit 75; a second INT ends at once."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from ..common.errors import Preempted

log = logging.getLogger("mmft")

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


class Listener:
    """Which signal has come. One listens for all runs of a process: those that are trained in step stop together."""

    def __init__(self) -> None:
        self.heard: int | None = None
        self.stepping = 0  # runs that are between the first and the last of their steps, and can stop after one

    def hear(self, number: int, frame: Any) -> None:
        if self.heard is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.heard = number
        name = signal.Signals(number).name
        if not self.stepping:
            raise Preempted(f"{name} before the first or after the last step; the same command, or mmft resume run=DIR, goes on")
        log.info("%-14s %s: the step is finished, saved, and the run stops (Ctrl-C once more ends it at once)", "stopping", name)


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[dict[int, Any]]:
    """`handler` for every signal of NAMES that this system has, until the block ends; by number, what answered before."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


@contextlib.contextmanager
def listening(running: list[Listener]) -> Iterator[Listener]:
    """Handlers for the time of a run. `running` holds the process's listener while there is one; inside another run that one serves.

    A handler that was there before (submitit's, which queues the job again) is called once the run has been saved.
    """
    if running:
        yield running[0]
        return
    listener = Listener()
    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield listener
        return
    try:
        with handled(listener.hear) as before:
            running.append(listener)
            try:
                yield listener
            finally:
                running.clear()
    finally:
        if listener.heard is not None:
            earlier = before.get(listener.heard)
            if callable(earlier) and earlier is not signal.default_int_handler:
                earlier(listener.heard, None)
