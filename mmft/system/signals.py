"""Signals TERM, INT, USR1 and USR2: finish the step, save, mark the run preempted, exit with 75. A second INT ends at once."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from ..common.errors import Preempted

log = logging.getLogger("mmft")

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2")


class Listener:
    """Remembers which signal came. One listener serves all runs of a process: jointly trained runs stop together.

    running: the number of runs between their first and their last step, which can stop after a step.
    """

    def __init__(self) -> None:
        self.heard: int | None = None
        self.running = 0

    def hear(self, number: int, frame: FrameType | None) -> None:
        """The signal handler. Raises Preempted if no run is training, KeyboardInterrupt at a second INT."""
        if self.heard is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.heard = number
        name = signal.Signals(number).name
        if not self.running:
            raise Preempted(f"{name} before the first or after the last step; the same command, or mmft resume run=DIR, goes on")
        log.info("%-14s %s: the step is finished, saved, and the run stops (Ctrl-C once more ends it at once)", "stopping", name)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[dict[int, Any]]:
    """Set `handler` for every signal of NAMES that the system has, for the block; yields the earlier handlers by number."""
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    earlier = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield earlier
    finally:
        for number, handler_before in earlier.items():
            signal.signal(number, handler_before)


@contextlib.contextmanager
def listening(listener: Listener | None) -> Iterator[Listener]:
    """Handle signals for the time of a run. listener: of an enclosing block, which then serves this run too.

    A handler that was set before (submitit's, which queues the job again) is called once the run has been saved.
    """
    if listener is not None:
        yield listener
        return
    listener = Listener()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield listener
        return
    earlier: dict[int, Any] = {}
    try:
        with handled(listener.hear) as earlier:
            yield listener
    finally:
        if listener.heard is not None:
            handler_before = earlier.get(listener.heard)
            if callable(handler_before) and handler_before is not signal.default_int_handler:
                handler_before(listener.heard, None)
