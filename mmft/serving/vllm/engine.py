"""The engine of `mmft serve backend=vllm`: requests become prompts here, vLLM batches and answers them, and its tokens go the way of every answer."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from ...common.errors import UserError
from ..adapters import ServedModel
from ..chat_request import RequestError
from ..engine import check_named, check_room
from ..jobs import Job, TokenInfo, refusal
from .backend import served_by_vllm
from .process import Output, Request, Vllm
from .prompts import Prompt, check_expanded, prompts, sampling

log = logging.getLogger("mmft")
PLACES = 256  # requests that vLLM has at the same time; its own scheduler decides which of them are computed together


@contextmanager
def served_engine(
    paths: Sequence[str], cfg: DictConfig, overrides: list[str], checkpoint: int | None, keys: Any, rows: int, places: int | None, queue: int
) -> Iterator[VllmEngine]:
    """An engine on vLLM for the block; arguments as those of `served_by_vllm`. places: requests at a time; None: PLACES. Raises UserError."""
    with served_by_vllm(paths, cfg, overrides, checkpoint, keys, rows) as served:
        engine = VllmEngine(served.vllm, served.models, places or PLACES, queue)
        try:
            yield engine
        finally:
            engine.close()


class VllmEngine:
    """See mmft.serving.engine.AnswerEngine. queue: requests that may wait until they are handed to vLLM, which has a queue of its own behind `places`.

    places: requests that vLLM has at the same time.
    """

    def __init__(self, vllm: Vllm, models: Sequence[ServedModel], places: int, queue: int):
        self.vllm, self.queue = vllm, queue
        self.models = {served.name: served for served in models}
        self._lines = {served.name: _Line(served, vllm.context) for served in models}
        self._free = threading.Semaphore(places)
        self._lock = threading.Lock()
        self._waiting: set[int] = set()  # ids of jobs that vLLM does not have yet
        self._closed = False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mmft-engine")  # one processor prepares the images of all requests

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        """vLLM runs already."""

    def close(self) -> None:
        self._closed = True
        self._free.release()
        self._pool.shutdown(cancel_futures=True)

    def submit(self, jobs: Sequence[Job]) -> None:
        check_named(self.models, jobs)
        with self._lock:
            check_room(len(self._waiting), jobs, self.queue)
            self._waiting |= {id(job) for job in jobs}
        for job in jobs:
            self._pool.submit(self._hand_over, job)

    def _hand_over(self, job: Job) -> None:
        self._free.acquire()
        handed = False
        try:
            if self._closed:
                job.fail(RequestError(503, "the server is shutting down", "server_shutting_down"))
            elif not job.cancelled.is_set():
                self._lines[job.request.model].hand_over(job, self.vllm, self._free.release)
                handed = True
        except RequestError as error:
            job.fail(error)
        except UserError as error:
            job.fail(refusal(error))
        except Exception as error:
            log.warning("%-14s %s: %s: %s", "serve", job.request.model, type(error).__name__, " ".join(str(error).split())[:300])
            job.fail(RequestError(500, f"the model failed: {type(error).__name__}", "server_error"))
        finally:
            with self._lock:
                self._waiting.discard(id(job))
            if not handed:
                self._free.release()


class _Line:
    """What the requests to one model share."""

    def __init__(self, served: ServedModel, context: int):
        self.served = served
        evaluator = served.opened.evaluator([])
        self.generation, self.limit = evaluator.generation, evaluator.limit.max_new_tokens
        self.ends = frozenset(served.collator.end_ids)
        self.context = context
        self.adapter: str | None = served.opened.model.adapter

    def hand_over(self, job: Job, vllm: Vllm, ended: Any) -> None:
        """Give a request to vLLM; `ended` is called once when its answer has ended. Raises RequestError, UserError for one that has no answer."""
        [prompt] = prompts(self.served.collator, job.request.sample, generation=True)
        job.begin(len(prompt.expanded), self.context, self.served.collator, self.generation, self.limit)
        _Answer(job, prompt, self, vllm, ended).start()

    def settings(self, job: Job) -> dict[str, Any]:
        """Keys of SamplingParams for a request, and for the rest those of the run."""
        sampler, drawn = job.sampler, job.sampler.temperature > 0
        keys = {**self.generation, "max_new_tokens": job.limit, "do_sample": drawn, "temperature": sampler.temperature if drawn else None, "top_p": sampler.top_p if drawn else None}
        found = sampling(keys, self.served.opened.model.generation, self.served.collator.end_ids)
        if drawn:
            found |= {"top_k": sampler.top_k or 0, **({} if sampler.seed is None else {"seed": sampler.seed})}
        count = job.request.settings.top_logprobs
        return found if count is None else {**found, "logprobs": count}


class _Answer:
    """One answer on its way from vLLM to its client."""

    def __init__(self, job: Job, prompt: Prompt, line: _Line, vllm: Vllm, ended: Any):
        self.job, self.prompt, self.line, self.vllm, self._ended = job, prompt, line, vllm, ended
        self._name = ""
        self._over = threading.Event()
        self._named = threading.Event()

    def start(self) -> None:
        request = Request(self.prompt.tokens, self.prompt.images, self.line.adapter, self.line.settings(self.job))
        try:
            self._name = self.vllm.submit(request, self.take)
        except UserError as error:
            raise RequestError(500, str(error), "server_error") from None
        self._named.set()

    def take(self, output: Output) -> None:
        """Add what is new; called in vLLM's thread, one output after another."""
        if self._over.is_set():
            return
        if output.error:
            self.job.fail(RequestError(500, "the model failed", "server_error"))
            log.warning("%-14s %s: %s", "serve", self.line.served.name, output.error)
            self._end(abort=False)
            return
        if output.prompt is not None:
            try:
                check_expanded(self.prompt, output.prompt, "this request")
            except UserError as error:
                self.job.fail(RequestError(500, str(error), "server_error"))
                self._end(abort=output.finish is None)
                return
        if self.job.cancelled.is_set():
            self._end(abort=output.finish is None)
            return
        wanted = self.job.request.settings.top_logprobs
        for place, token in enumerate(output.new):
            info = None
            if wanted is not None and output.logprobs is not None:
                top = [(int(t), float(value)) for t, value in output.logprobs[place]]
                info = TokenInfo(token, dict(top)[token], top[:wanted])
            if self.job.write(token, self.line.ends, info):
                self._end(abort=output.finish is None)
                return
        if output.finish is not None:  # by vLLM's own limit, such as its context
            self.job.end("length")
            self._end(abort=False)

    def _end(self, abort: bool) -> None:
        self._over.set()
        if abort:
            self._named.wait(10)
            self.vllm.abort(self._name)
        self._ended()
