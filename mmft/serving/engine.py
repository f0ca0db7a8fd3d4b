"""Answers requests to several models in one thread: each model has a lane (lane.py), and the lanes take turns token by token."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..evaluation.decode import Undecodable
from .adapters import ServedModel
from .chat_request import RequestError
from .jobs import Job
from .lane import Lane


class AnswerEngine(Protocol):
    """What the server and the check at the start use of an engine: this one, or vLLM's (vllm/engine.py).

    models: name -> model, of all that clients may ask for. waiting: requests that have not begun.
    """

    @property
    def models(self) -> Mapping[str, ServedModel]: ...

    @property
    def waiting(self) -> int: ...

    def start(self) -> None: ...

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add requests, all at once. Raises RequestError for an unknown model and for a queue that is full."""
        ...

    def close(self) -> None: ...


def check_named(models: Mapping[str, ServedModel], jobs: Sequence[Job]) -> None:
    """Raises RequestError for a request to a model that is not served."""
    for job in jobs:
        if job.request.model not in models:
            raise no_such_model(job.request.model, models)


def no_such_model(name: str, models: Mapping[str, ServedModel]) -> RequestError:
    return RequestError(404, f"there is no model {name[:200]!r}; there are: {', '.join(models)}", "model_not_found", "model")


def check_room(waiting: int, jobs: Sequence[Job], queue: int) -> None:
    """Raises RequestError if so many requests wait that there is no place for these."""
    if waiting + len(jobs) > queue:
        raise RequestError(429, f"{waiting} requests are waiting already; try again later", "rate_limit_exceeded")


class Engine:
    """All lanes and the thread that works through them. places: rows of one model that are answered at once. queue: requests that may wait."""

    def __init__(self, models: Sequence[ServedModel], places: int, queue: int):
        self.models = {served.name: served for served in models}
        self.lanes = {served.name: Lane(served, places) for served in models}
        self.queue = queue
        for served in models:
            served.opened.model.eval()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="mmft-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        return sum(len(lane.waiting) for lane in self.lanes.values())

    def submit(self, jobs: Sequence[Job]) -> None:
        """Add requests, all at once. Raises RequestError for an unknown model and for a queue that is full."""
        check_named(self.models, jobs)
        with self._changed:
            check_room(self.waiting, jobs, self.queue)
            for job in jobs:
                self.lanes[job.request.model].waiting.append(job)
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._closed and not any(lane.busy for lane in self.lanes.values()):
                    self._changed.wait()
                if self._closed:
                    break
            for lane in self.lanes.values():
                self._advance(lane)
        for lane in self.lanes.values():
            for job in [*lane.waiting, *lane.jobs.values()]:
                job.fail(RequestError(503, "the server is shutting down", "server_shutting_down"))

    def _advance(self, lane: Lane) -> None:
        """One step of a lane. What goes wrong ends the requests of this lane's batch, and no others."""
        try:
            if lane.alone:
                if lane.waiting:
                    lane.answer_alone()
                return
            lane.admit()
            try:
                lane.step()
            except Undecodable as why:
                lane.to_loop(str(why))
        except Exception as error:
            lane.failed(error, list(lane.jobs.values()))
            lane.jobs.clear()
            lane.rows = None
