"""A group on a CPU in several processes side by side: each trains some of the points in step, on some of the cores.

Between the products of small matrices one core works and the others wait; two processes with a core each do not wait for
each other. They are forked, so that all of them read one copy of the base, the prepared data and what was imported.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import Preempted, UserError
from ..reports.numbers import memory
from ..system.signals import NAMES, handled

log = logging.getLogger("mmft")

OWN = 1 << 30  # bytes of free memory a process must find for itself
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def how_many(points: int, device: str, wanted: int | None) -> int:
    """Processes for so many points on this device, as `wanted` or one for each of torch's threads; 1 where none can be forked.

    A process that has used a GPU cannot be forked; macOS's own libraries break in a forked process; Windows cannot fork.
    """
    import torch

    from ..system.memory import free_memory

    if device != "cpu" or sys.platform != "linux" or torch.cuda.is_available() or threading.current_thread() is not threading.main_thread():
        return 1
    return max(1, min(points, wanted or min(torch.get_num_threads(), free_memory(device) // OWN)))


def dealt(sizes: Sequence[float], hands: int) -> list[list[int]]:
    """The positions of `sizes` in so many parts of as many entries, give or take one, and of about the same sum: the largest first, each to the smallest sum."""
    few, more = divmod(len(sizes), hands)
    parts: list[list[int]] = [[] for _ in range(hands)]
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        full = few if sum(len(part) > few for part in parts) == more else few + 1
        min((part for part in parts if len(part) < full), key=lambda part: sum(sizes[i] for i in part)).append(n)
    return [sorted(part) for part in parts]


@dataclass
class Ended:
    """What one process left: the answer of its job, or why there is none."""

    answer: Any = None
    why: str | None = None


def side_by_side(jobs: Sequence[Callable[[], Any]]) -> list[Ended]:
    """Each job in a process of its own; an answer comes back as JSON. A signal to this process goes to all of them.

    Errors raised, after every process has ended: Preempted and KeyboardInterrupt, when a job ended by one; UserError, when a job raised it.
    """
    import torch

    threads, here = max(1, torch.get_num_threads() // len(jobs)), os.getpid()
    numbers = [getattr(signal, name) for name in NAMES]
    running: list[int] = []
    found: list[dict[str, Any]] = []

    def fork_and_wait() -> None:
        """In a thread that has computed nothing, since a fork loses the threads by which OpenMP lets this one compute; it ends last, since the children end with it."""
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a child must not answer a signal with this process's handlers
        pipes = []
        for n, job in enumerate(jobs):
            reading, writing = os.pipe()
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", DeprecationWarning)  # there are other threads; none holds a lock that a job takes
                    process = os.fork()
            except OSError as error:
                os.close(writing)
                pipes.append((None, reading))
                log.warning("%-14s process %d of %d cannot be started: %s", "joint", n + 1, len(jobs), error.strerror)
                continue
            if process == 0:
                _child(job, n + 1, len(jobs), threads, numbers, here, writing)
            os.close(writing)
            running.append(process)
            pipes.append((process, reading))
        for process, reading in pipes:
            found.append(_end_of(process, reading))
            if process in running:
                running.remove(process)

    def pass_on(number: int, frame: Any) -> None:
        """Each process saves and stops as a run alone does."""
        for process in list(running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    sys.stdout.flush()
    sys.stderr.flush()
    with handled(pass_on):
        waiting = threading.Thread(target=fork_and_wait)
        waiting.start()
        waiting.join()
    return _answers(found)


def _child(job: Callable[[], Any], number: int, of: int, threads: int, numbers: list[int], parent: int, writing: int) -> None:
    """Never returns."""
    import torch


    said: dict[str, Any] = {}
    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # killed with its parent, it leaves what one killed process leaves
        if os.getppid() != parent:
            os._exit(1)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent, which passes it on: once, not twice
        for n in numbers:
            signal.signal(n, signal.default_int_handler if n == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        torch.set_num_threads(threads)
        memory.sharers = of
        said["answer"] = job()
    except Preempted as stop:
        said["preempted"] = str(stop)
    except KeyboardInterrupt:
        said["interrupted"] = True
    except UserError as error:
        said["refused"] = str(error)
    except BaseException as error:
        log.exception("%-14s process %d of %d", "failed", number, of)
        said["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        with open(writing, "w", encoding="utf-8") as pipe, contextlib.suppress(OSError):  # nobody may be there to read it
            json.dump(said, pipe, default=str)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what the parent has open is the parent's to close


def _end_of(process: int | None, reading: int) -> dict[str, Any]:
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    if process is None:
        return {"failed": "no process could be started for it"}
    _, status = os.waitpid(process, 0)
    try:
        return json.loads(text)
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"failed": f"its process ended by {how}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")}


def _answers(found: list[dict[str, Any]]) -> list[Ended]:
    if any("interrupted" in said for said in found):
        raise KeyboardInterrupt
    for kind, error in (("preempted", Preempted), ("refused", UserError)):
        for said in found:
            if kind in said:
                raise error(said[kind])
    return [Ended(said.get("answer"), said.get("failed")) for said in found]
