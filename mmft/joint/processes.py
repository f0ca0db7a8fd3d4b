"""Run the shares of a joint group in forked processes, each on some of the cores of a CPU.

Between the products of small matrices one core works and the others wait; two processes with a core each do not wait for each other.
Forked processes share one copy of the base model, the prepared data and the imported modules.
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
from types import FrameType
from typing import TypedDict

from ..common.errors import Preempted, UserError
from ..system.memory import free_memory
from ..system.signals import NAMES, handled

log = logging.getLogger("mmft")

PER_PROCESS = 1 << 30  # bytes of free memory that each process needs
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


def process_count(points: int, device: str, wanted: int | None) -> int:
    """The number of processes for so many points: `wanted`, or one for each of torch's threads; 1 where forking is not possible.

    A process that has used a GPU cannot be forked, libraries of macOS break in a forked process, and Windows cannot fork.
    """
    import torch

    if device != "cpu" or sys.platform != "linux" or torch.cuda.is_available() or threading.current_thread() is not threading.main_thread():
        return 1
    return max(1, min(points, wanted or min(torch.get_num_threads(), free_memory(device) // PER_PROCESS)))


def divide(sizes: Sequence[float], parts_wanted: int) -> list[list[int]]:
    """The positions of `sizes` in parts of equal count (give or take one) and about equal sum: the largest first, each to the smallest sum."""
    few, more = divmod(len(sizes), parts_wanted)
    parts: list[list[int]] = [[] for _ in range(parts_wanted)]
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        full = few if sum(len(part) > few for part in parts) == more else few + 1
        min((part for part in parts if len(part) < full), key=lambda part: sum(sizes[i] for i in part)).append(n)
    return [sorted(part) for part in parts]


class Reply(TypedDict, total=False):
    """What a process writes to its parent: the result, or one of the errors."""

    result: object
    preempted: str
    interrupted: bool
    refused: str
    failed: str


@dataclass
class Outcome:
    """What one process returned, or why it returned nothing."""

    result: object = None
    why: str | None = None


def run_side_by_side(jobs: Sequence[Callable[[], object]]) -> list[Outcome]:
    """Run each job in its own process; results come back as JSON. A signal to this process is passed on to all of them.

    Raises, after every process has ended, Preempted, KeyboardInterrupt or UserError if a job raised it.
    """
    import torch

    threads, here = max(1, torch.get_num_threads() // len(jobs)), os.getpid()
    numbers = [getattr(signal, name) for name in NAMES]
    running: list[int] = []
    replies: list[Reply] = []

    def fork_and_wait() -> None:
        """Runs in a thread that has computed nothing, because a fork loses the OpenMP threads of one that has; children die with this thread."""
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # a child must not answer a signal with this process's handlers
        pipes: list[tuple[int | None, int]] = []
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
        for child, reading in pipes:
            replies.append(_reply_of(child, reading))
            if child is not None:
                running.remove(child)

    def pass_on(number: int, frame: FrameType | None) -> None:
        """Each process saves and stops as a single run does."""
        for process in list(running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)

    sys.stdout.flush()
    sys.stderr.flush()
    with handled(pass_on):
        waiting = threading.Thread(target=fork_and_wait)
        waiting.start()
        waiting.join()
    return _outcomes(replies)


def _child(job: Callable[[], object], number: int, of: int, threads: int, numbers: list[int], parent: int, writing: int) -> None:
    """Run one job and exit; never returns."""
    import torch

    reply: Reply = {}
    try:
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)  # a child of a killed parent dies too
        if os.getppid() != parent:
            os._exit(1)
        os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the parent, which passes it on: once, not twice
        for n in numbers:
            signal.signal(n, signal.default_int_handler if n == signal.SIGINT else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
        torch.set_num_threads(threads)
        reply["result"] = job()
    except Preempted as stop:
        reply["preempted"] = str(stop)
    except KeyboardInterrupt:
        reply["interrupted"] = True
    except UserError as error:
        reply["refused"] = str(error)
    except BaseException as error:
        log.exception("%-14s process %d of %d", "failed", number, of)
        reply["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        with open(writing, "w", encoding="utf-8") as pipe, contextlib.suppress(OSError):  # the parent may be gone
            json.dump(reply, pipe, default=str)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # what the parent has open is the parent's to close


def _reply_of(process: int | None, reading: int) -> Reply:
    with open(reading, encoding="utf-8") as pipe:
        text = pipe.read()
    if process is None:
        return {"failed": "no process could be started for it"}
    _, status = os.waitpid(process, 0)
    try:
        reply: Reply = json.loads(text)
        return reply
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return {"failed": f"its process ended by {how}" + (", perhaps for want of memory" if code == -signal.SIGKILL else "")}


def _outcomes(replies: list[Reply]) -> list[Outcome]:
    if any("interrupted" in reply for reply in replies):
        raise KeyboardInterrupt
    for reply in replies:
        if "preempted" in reply:
            raise Preempted(reply["preempted"])
    for reply in replies:
        if "refused" in reply:
            raise UserError(reply["refused"])
    return [Outcome(reply.get("result"), reply.get("failed")) for reply in replies]
