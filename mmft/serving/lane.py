"""The requests to one model: those that wait, and those in its batch, which they join and leave token by token.

Rows are computed as `predict` computes them (mmft/evaluation/decode.py), with the model's own adapter and collator. Models and settings that
need transformers' own loop are answered one request at a time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from ..common.errors import UserError
from ..common.model_parts import is_encoder_decoder
from ..evaluation.decode import Rows, Undecodable, first_tokens, generate, group_size, why_not
from .adapters import ServedModel
from .chat_request import RequestError
from .jobs import Job, TokenInfo, refusal
from .sampling import top_tokens

log = logging.getLogger("mmft")


class Lane:
    """The requests to one model: those that wait, and those in its batch."""

    def __init__(self, served: ServedModel, places: int):
        self.served, self.places = served, places
        self.waiting: deque[Job] = deque()
        self.jobs: dict[int, Job] = {}  # key of a row in the batch -> its request
        self.rows: Rows | None = None
        self._count = 0
        opened = served.opened
        evaluator = opened.evaluator([])
        self.generation = evaluator.generation
        self.limit = evaluator.limit.max_new_tokens
        evaluator.generation = {**self.generation, "do_sample": False, **dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p"))}
        self.greedy = evaluator.generation_config()
        self.alone = why_not(self.greedy) or ""  # why transformers' own loop answers, "" if it does not
        self.ends = frozenset(served.collator.end_ids)
        self.context: int | None = getattr(opened.model.config.get_text_config(), "max_position_embeddings", None)
        self.encoder_decoder = is_encoder_decoder(opened.model.config)
        if self.encoder_decoder:
            self.context = None  # of the prompt alone

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.jobs)

    def admit(self) -> None:
        """Let as many waiting requests join the batch as there are places, as many at once as `decode` takes."""
        while self.waiting and not self.alone and len(self.jobs) + group_size(self.places) <= self.places:
            group = [self.waiting.popleft() for _ in range(min(len(self.waiting), group_size(self.places)))]
            group = [job for job in group if not job.cancelled.is_set()]
            prompted = self._prompted(group)
            if prompted is None:
                continue
            group, batch = prompted
            try:
                with self.served.use() as model:
                    new = generate(model, batch, self.greedy, custom_generate=first_tokens)
            except Undecodable as why:
                self.to_loop(str(why), group)
                return
            except Exception as error:  # a prompt that does not fit in memory leaves the others' answers alone
                self.failed(error, group)
                continue
            new.keys, new.ids = list(range(self._count, self._count + len(group))), [[] for _ in group]
            self._count += len(group)
            self.jobs |= dict(zip(new.keys, group, strict=True))
            self._write(new)
            self.rows = new if self.rows is None else self.rows.joined(new)

    def to_loop(self, why: str, group: Sequence[Job] = ()) -> None:
        """From now on transformers' own loop answers. Requests that have begun start anew."""
        self.alone = why
        log.info("%-14s %s: requests are answered one by one in transformers' own loop: %s", "serve", self.served.name, why)
        self.waiting.extendleft(reversed([*group, *self.jobs.values()]))
        self.jobs.clear()
        self.rows = None

    def step(self) -> None:
        """One token more for each row of the batch."""
        if self.rows is None:
            return
        if len(self.rows.finished) == len(self.rows.keys):
            self.rows = None
            return
        if len(self.rows.finished) >= group_size(len(self.rows.keys)):
            self.rows = self.rows.joined(None)
        with self.served.use():
            self.rows.step()
        self._write(self.rows)

    def failed(self, error: Exception, jobs: Sequence[Job]) -> None:
        """Tell requests that the model failed, and the log why."""
        if isinstance(error, UserError):
            refused = refusal(error)
        else:
            refused = RequestError(500, f"the model failed: {type(error).__name__}", "server_error")
            log.warning("%-14s %s: %s: %s", "serve", self.served.name, type(error).__name__, " ".join(str(error).split())[:300])
        for job in jobs:
            job.fail(refused)

    def _prompted(self, group: list[Job]) -> tuple[list[Job], Any] | None:
        """(requests, their prompt batch); requests that cannot be read, or are too long, get their error and are left out."""
        while group:
            try:
                batch = self.served.collator.prompt([job.request.sample for job in group])
            except UserError as error:
                if len(group) == 1:
                    group[0].fail(refusal(error))
                    return None
                good = []
                for job in group:
                    try:
                        self.served.collator.prompt([job.request.sample])
                        good.append(job)
                    except UserError as own:
                        job.fail(refusal(own))
                group = good
                continue
            good = []
            for job, tokens in zip(group, batch["attention_mask"].sum(dim=1).tolist(), strict=True):
                try:
                    job.begin(int(tokens), self.context, self.served.collator, self.generation, self.limit)
                    good.append(job)
                except RequestError as refused:
                    job.fail(refused)
            if len(good) == len(group):
                return group, batch
            group = good
        return None

    def _write(self, rows: Rows) -> None:
        """Choose each row's token, and add it to its answer."""
        assert rows.logits is not None
        scores: torch.Tensor | None = None
        chosen = rows.last.tolist()
        for place, key in enumerate(rows.keys):
            if place in rows.finished:
                continue
            job = self.jobs[key]
            if job.cancelled.is_set():
                rows.finished.add(place)
                del self.jobs[key]
                continue
            if job.sampler.temperature:
                scores = rows.fixed.processed(rows.logits, rows.seen) if scores is None else scores
                chosen[place] = job.sampler.draw(scores[place])
                rows.last[place] = chosen[place]
            count = job.request.settings.top_logprobs
            info = None if count is None else TokenInfo(chosen[place], *top_tokens(rows.logits[place], chosen[place], count))
            if job.write(chosen[place], self.ends, info):
                rows.finished.add(place)
                del self.jobs[key]

    # --- transformers' own loop -------------------------------------------------------------------------------------

    def answer_alone(self) -> None:
        """Answer the next waiting request with transformers' `generate`."""
        job = self.waiting.popleft()
        if job.cancelled.is_set():
            return
        try:
            self._answer_alone(job)
        except Exception as error:
            self.failed(error, [job])

    def _answer_alone(self, job: Job) -> None:
        if (prompted := self._prompted([job])) is None:
            return
        batch = prompted[1]
        start = 1 if self.encoder_decoder else batch["input_ids"].shape[1]
        settings = self._settings(job)
        watch = _Watch(job, self.ends, start, streamed=(settings.num_beams or 1) == 1)
        with self.served.use() as model, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(job.sampler.seed if job.sampler.seed is not None else torch.seed())
            ids = generate(model, batch, settings, logits_processor=[watch.recorder], stopping_criteria=[watch])
        if not watch.ended and not job.cancelled.is_set():
            for token in ids[0, start + job.written :].tolist():
                if job.write(token, self.ends, None):
                    return
            job.end("stop")

    def _settings(self, job: Job) -> GenerationConfig:
        evaluator = self.served.opened.evaluator([])
        keys: dict[str, Any] = {**self.generation, "max_new_tokens": job.limit, "max_length": None}
        if job.request.settings.temperature is not None or job.sampler.temperature:
            drawn = job.sampler.temperature > 0
            keys |= {"do_sample": drawn, "temperature": job.sampler.temperature if drawn else None, "top_p": job.sampler.top_p if drawn else None}
        evaluator.generation = keys
        return evaluator.generation_config()


class _Watch(StoppingCriteria):
    """Sends a request's tokens while transformers generates them, and stops it when the answer has ended."""

    def __init__(self, job: Job, ends: frozenset[int], start: int, streamed: bool):
        self.job, self.ends, self.start, self.streamed, self.ended = job, ends, start, streamed, False
        self.recorder = _Recorder()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if self.streamed and not self.ended:
            for token in input_ids[0, self.start + self.job.written :].tolist():
                count = self.job.request.settings.top_logprobs
                info = None if count is None or self.recorder.last is None else TokenInfo(token, *top_tokens(self.recorder.last[0], token, count))
                self.ended = self.ended or self.job.write(token, self.ends, info)
        return torch.full((input_ids.shape[0],), self.ended or self.job.cancelled.is_set(), dtype=torch.bool, device=input_ids.device)


class _Recorder(LogitsProcessor):
    """Keeps the last scores."""

    last: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.last = scores
        return scores
