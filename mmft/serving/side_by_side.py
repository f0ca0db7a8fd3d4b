"""Ask several models for the same answer, one after another, and stream their texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

from ..data.sample import Sample
from ..runs.open import OpenedRun
from .stream import stream

AnswerState = tuple[str | None, bool]  # (text so far, None before the first; whether it is finished)
Update = tuple[int, str, bool] | BaseException | None  # (model, text, finished); an error; None at the end


@dataclass
class Model:
    """One column of answers. kind: base or tuned (its colour). base: the run's model with its adapter switched off."""

    label: str
    kind: str
    about: str
    opened: OpenedRun
    base: bool = False

    def use(self) -> contextlib.AbstractContextManager[Any]:
        """A block in which the model is this one."""
        return self.opened.base() if self.base else contextlib.nullcontext(self.opened.model)


class Bench:
    """The models of the page. One request at a time, since base and tuned model share weights and the adapter is switched."""

    def __init__(self, models: Sequence[Model]):
        self.models = models
        self._lock = Lock()

    def answers(self, sample: Sample, generation: Mapping[str, Any], seed: int) -> Iterator[list[AnswerState]]:
        """Yield the state of all columns after each change. Raises UserError and what generation raises.

        A thread generates. It stops soon after the consumer does, and then leaves the adapter switched on.
        """
        updates: Queue[Update] = Queue()
        stop = Event()
        Thread(target=self._generate, args=(sample, generation, seed, updates, stop), daemon=True).start()
        state: list[AnswerState] = [(None, False)] * len(self.models)
        try:
            yield list(state)
            while (update := updates.get()) is not None:
                if isinstance(update, BaseException):
                    raise update
                index, text, finished = update
                state[index] = text, finished
                yield list(state)
        finally:
            stop.set()

    def _generate(self, sample: Sample, generation: Mapping[str, Any], seed: int, updates: Queue[Update], stop: Event) -> None:
        from transformers import set_seed

        try:
            with self._lock:
                for i, column in enumerate(self.models):
                    evaluator = column.opened.evaluator([])
                    evaluator.generation = {**evaluator.generation, **generation}
                    set_seed(seed)  # the same for every model
                    text = ""
                    with column.use() as model, contextlib.closing(stream(evaluator, model, [sample])) as texts:
                        for text in texts:
                            updates.put((i, text, False))
                            if stop.is_set():
                                return
                    updates.put((i, text, True))
        except BaseException as error:
            updates.put(error)
        finally:
            updates.put(None)


def generation_keys(max_new_tokens: float, temperature: float, top_p: float, num_beams: float) -> dict[str, Any]:
    """The page's controls under transformers' names; temperature 0 is greedy (or plain beam) search."""
    keys: dict[str, Any] = {"max_new_tokens": max(1, int(max_new_tokens or 1)), "num_beams": int(num_beams), "do_sample": temperature > 0}
    return {**keys, "temperature": float(temperature), "top_p": float(top_p)} if temperature > 0 else {**keys, "temperature": None, "top_p": None}
