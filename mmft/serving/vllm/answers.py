"""Measure and predict with vLLM: an evaluator whose answers and losses come from its process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...collators.base import IGNORE
from ...common.errors import UserError
from ...data.sample import Sample
from ...evaluation.evaluate import Evaluator
from ...evaluation.generate import Answer, Outcome
from ...system.console import shows_progress
from .process import Completed, Request, Vllm
from .prompts import Prompt, check_expanded, prompts, sampling


@dataclass
class VllmModel:
    """What stands where the loaded model would be. adapter: the name of one, None for the base. config, generation: of the model."""

    vllm: Vllm
    adapter: str | None
    config: Any
    generation: Mapping[str, Any]


@dataclass
class AdaptedModel(VllmModel):
    """The same for a run with an adapter, which can be switched off, as peft's models."""

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        name, self.adapter = self.adapter, None
        try:
            yield
        finally:
            self.adapter = name


@dataclass
class VllmEvaluator(Evaluator):
    """seed: of answers that are drawn; each row draws with its own, counted from it."""

    seed: int = 0

    def row_losses(self, model: Any) -> list[tuple[float, int]]:
        """See Evaluator: from the log-probabilities of a row's tokens, which vLLM computes for a prompt."""
        from tqdm import tqdm

        losses = [[0.0, 0] for _ in self.rows]
        handed: dict[tuple[int, int], Prompt] = {}

        def requests() -> Iterator[tuple[tuple[int, int], Request]]:
            for i in range(len(self.rows)):
                for n, prompt in enumerate(prompts(self.collator, self.rows[i], generation=False)):
                    handed[i, n] = prompt
                    yield (i, n), Request(prompt.tokens, prompt.images, model.adapter, {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": 0})

        with tqdm(total=len(self.rows), desc="loss", leave=False, disable=not (self.progress and len(self.rows) > 1 and shows_progress())) as bar:
            for (i, n), done in model.vllm.complete(requests()):
                prompt = handed.pop((i, n))
                check_expanded(prompt, done.prompt, self.rows[i].id)
                values = [-float(value or 0.0) for value, label in zip(done.prompt_logprobs, prompt.labels, strict=True) if label != IGNORE]
                losses[i][0] += sum(values)
                losses[i][1] += len(values)
                bar.update(n == 0)
        return [(loss, int(tokens)) for loss, tokens in losses]

    def answers(self, model: Any, rows: Sequence[Sample]) -> Iterator[Outcome]:
        """See Evaluator. All rows are handed over as vLLM takes them; it makes the batches."""
        from tqdm import tqdm

        if self.chooser is not None:
            raise UserError("evaluation.answer=choose: backend=vllm generates answers and does not choose; use backend=transformers")
        with tqdm(total=len(rows), desc="answers", unit=" rows", leave=False, disable=not (self.progress and len(rows) > 1 and shows_progress())) as bar:
            for index, done in self.completed(model, rows):
                if isinstance(done, UserError):
                    yield index, done
                else:
                    ended = done.finish == "stop"
                    yield index, Answer(self.collator.decode([without_end(done, self.collator.end_ids)])[0], not ended)
                bar.update()

    def completed(self, model: Any, rows: Sequence[Sample], logprobs: int | None = None) -> Iterator[tuple[int, Completed | UserError]]:
        """(index, answer in tokens) of every row in the order in which they end, or why the row cannot be read. logprobs: of the likeliest tokens."""
        settings = sampling(self.generation, model.generation, self.collator.end_ids)
        handed: dict[int, Prompt] = {}
        failures: list[tuple[int, UserError]] = []

        def requests() -> Iterator[tuple[int, Request]]:
            for i in range(len(rows)):
                try:
                    [handed[i]] = prompts(self.collator, rows[i], generation=True)
                except UserError as error:
                    failures.append((i, error))
                    continue
                own = {**settings, **({"seed": self.seed + i} if settings["temperature"] else {}), **({} if logprobs is None else {"logprobs": logprobs})}
                yield i, Request(handed[i].tokens, handed[i].images, model.adapter, own)

        for index, done in model.vllm.complete(requests()):
            check_expanded(handed.pop(index), done.prompt, rows[index].id)
            yield from take(failures)
            yield index, done
        yield from take(failures)


def take(failures: list[tuple[int, UserError]]) -> Iterator[tuple[int, UserError]]:
    while failures:
        yield failures.pop(0)


def without_end(done: Completed, end_ids: Sequence[int]) -> list[int]:
    """The tokens of an answer without the end token that vLLM leaves in it."""
    return done.ids[:-1] if done.ids and done.ids[-1] in end_ids else done.ids
