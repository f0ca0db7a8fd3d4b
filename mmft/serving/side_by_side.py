"""Several models asked for the same answer, one after another, their texts as they grow: what the live page shows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Queue
from threading import Event, Lock, Thread
from typing import Any

from .stream import stream


@dataclass
class Model:
    """One column of answers. kind: base or tuned (its colour). base: the run's model with its adapter off."""

    label: str
    kind: str
    about: str
    opened: Any
    base: bool = False

    def use(self) -> Any:
        return self.opened.base() if self.base else contextlib.nullcontext(self.opened.model)


class Bench:
    """The models, asked one after another: one request at a time, since an adapter is switched on and off for all."""

    def __init__(self, models: list[Model]):
        self.models = models
        self._lock = Lock()

    def answers(self, sample: Any, generation: dict[str, Any], seed: int) -> Iterator[list[tuple[str | None, bool]]]:
        """The state of all columns again and again: (text so far or None, whether it is finished) for each model.

        A thread of its own does the work: it ends soon, and leaves the adapter on, when nobody listens any more.
        Errors raised: UserError and what generation raises.
        """
        news: Queue[Any] = Queue()
        stop = Event()
        Thread(target=self._work, args=(sample, generation, seed, news, stop), daemon=True).start()
        state: list[tuple[str | None, bool]] = [(None, False)] * len(self.models)
        try:
            yield list(state)
            while (item := news.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                state[item[0]] = item[1:]
                yield list(state)
        finally:
            stop.set()

    def _work(self, sample: Any, generation: dict[str, Any], seed: int, news: Queue[Any], stop: Event) -> None:
        from transformers import set_seed

        try:
            with self._lock:
                for i, one in enumerate(self.models):
                    evaluator = one.opened.evaluator([])
                    evaluator.generation = {**evaluator.generation, **generation}
                    set_seed(seed)  # the same for every model
                    text = ""
                    with one.use() as model, contextlib.closing(stream(evaluator, model, [sample])) as texts:
                        for text in texts:
                            news.put((i, text, False))
                            if stop.is_set():
                                return
                    news.put((i, text, True))
        except BaseException as error:
            news.put(error)
        finally:
            news.put(None)


def generation_keys(max_new_tokens: float, temperature: float, top_p: float, num_beams: float) -> dict[str, Any]:
    """The page's controls under transformers' names; temperature 0 is greedy (or plain beam) search."""
    keys: dict[str, Any] = {"max_new_tokens": max(1, int(max_new_tokens or 1)), "num_beams": int(num_beams), "do_sample": temperature > 0}
    return {**keys, "temperature": float(temperature), "top_p": float(top_p)} if temperature > 0 else {**keys, "temperature": None, "top_p": None}
