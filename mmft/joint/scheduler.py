"""A group trained in step: each member is a Trainer in a greenlet of its own, and one of them runs at a time.

    member 1   load, measure, attach ... batch -> waits     ... its own optimizer, logs, evaluation ... batch -> waits
    member 2                                        batch -> waits                                          ...
    leader                                                   one forward and backward for all that wait

A member sees what it would see alone: its own batches, random numbers (the global generators are swapped with the turn),
schedule, clipping, callbacks and run directory. Only the pass through the base is common. A member that ends early (early
stopping, an error, pruned) leaves; the others go on.

Greenlets and not threads: every thread that computes gets worker threads of its own from OpenMP, and more of them than
cores made the common pass half as fast. Members change places only in `Seat.step`, where no context of torch (no_grad,
autocast), which belongs to the thread, is open.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from greenlet import getcurrent, greenlet

from ..common.errors import Preempted
from ..rewrites.instead import instead
from ..system.memory import fitting, freed, is_out
from .stacked_model import Rows, carrier, losses

log = logging.getLogger("mmft")


@dataclass
class Posted:
    """A micro-batch a member hands to the leader: tensors on the device, and the divisor of its loss (tokens of the step)."""

    trainer: Any
    inputs: dict[str, Any]
    items: Any


class Seat:
    """One member's place in the group: what its training calls, and what the leader wakes it by."""

    def __init__(self, group: Group, number: int, name: str):
        self.group, self.number, self.name = group, number, name
        self.life: greenlet | None = None
        self.posted: Posted | None = None
        self.answer: Any = None
        self.random = _random_state()

    @property
    def done(self) -> bool:
        return self.life is not None and self.life.dead

    @property
    def size(self) -> int:
        """How many points are trained at once: the members the group began with, and those of other processes."""
        return self.group.size

    def step(self, trainer: Any, inputs: dict[str, Any], items: Any) -> tuple[Any, Any]:
        """(the micro-batch's loss divided by `items`, its supervised tokens); the gradients are in the member's parameters.

        Errors raised: whatever went wrong in the common pass, or KeyboardInterrupt.
        """
        self.posted = Posted(trainer, inputs, items)
        state = trainer.accelerator.gradient_state  # one for all Accelerators of a process; a member ahead has set it for its next step
        syncs = state.sync_gradients
        answer = self.group.leader.switch()
        state._set_sync_gradients(syncs)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def say(self, step: int, of: int, loss: str, left: str) -> None:
        """One line for the whole group once every member has logged this step."""
        said = self.group.said.setdefault(step, {})
        said[self.number] = loss
        if set(said) >= {s.number for s in self.group.seats if not s.done}:
            losses = " ".join(said[n] for n in sorted(said))
            line = f"{self.group.label}step {step:{len(str(of))}d}/{of}  loss {losses}  {left} left"
            log.info(line, extra={"shown": True})  # of the group, so in no point's own log
            del self.group.said[step]


class Group:
    """Runs members' jobs in step. `shared` holds the base (mmft/sweeps/shared_base.py); `size` points are trained at once, here and beside; `label` begins its lines."""

    def __init__(self, shared: Any, names: list[str], size: int | None = None, label: str = ""):
        self.shared, self.leader, self.size, self.label = shared, getcurrent(), size or len(names), label
        self.seats = [Seat(self, number, name) for number, name in enumerate(names)]
        self.rows, self.carrier = Rows(), None
        self.most = len(names)  # members in one pass
        self.said: dict[int, dict[int, str]] = {}
        self.stop: Preempted | None = None
        self.results: list[Any] = [None] * len(names)

    def run(self, jobs: list[Callable[[Seat], Any]]) -> list[Any]:
        """What each job returned. Errors raised: KeyboardInterrupt, and what a job lets through; the other members hear of it first."""
        for seat, job in zip(self.seats, jobs, strict=True):
            seat.life = greenlet(job)
        try:
            self._lead()
        except BaseException as error:
            for seat in self.seats:
                if seat.life and not seat.done:  # in the middle of training: it leaves a directory that says what happened
                    seat.answer = error
                    with contextlib.suppress(type(error)):
                        self._turn(seat)
            raise
        finally:
            self.carrier = None
        return self.results

    def _lead(self) -> None:
        while living := [s for s in self.seats if not s.done]:
            for seat in living:
                if seat.posted is None:
                    self._turn(seat)
            waiting = [s for s in self.seats if s.posted is not None]
            if waiting:
                self._pass(waiting)
        if self.stop is not None:
            raise self.stop

    def _turn(self, seat: Seat) -> None:
        """Let one member run until it waits for the next pass, or ends; with random numbers of its own."""
        outside = _random_state()
        _set_random_state(seat.random)
        try:
            answer, seat.answer = seat.answer, None
            # a greenlet is true once it has begun; what it is first given is its job's argument
            value = seat.life.switch(answer if seat.life else seat)
        except Preempted as stop:  # it has saved itself; so will the others, each after this very step
            self.stop, value = stop, None
        finally:
            seat.random = _random_state()
            _set_random_state(outside)
        if seat.done:
            self.results[seat.number] = value

    def _pass(self, waiting: list[Seat]) -> None:
        if self.carrier is None:
            args = waiting[0].posted.trainer.args
            kwargs = {**(getattr(args, "gradient_checkpointing_kwargs", None) or getattr(args, "activation_checkpointing_kwargs", None) or {})}
            on = getattr(args, "gradient_checkpointing", False) or getattr(args, "activation_checkpointing", False)
            models = {s.number: s.posted.trainer.model for s in waiting}
            self.carrier = carrier(self.shared.base.model, models, self.rows, kwargs if on else None)
            self.most = min(len(self.seats), fitting(lambda: self._losses(waiting[:1]), self.shared.base.device, len(waiting)))
            if self.most < len(waiting):
                log.info("%-14s %d adapters a pass: more would not fit into memory", "joint", self.most)
        for start in range(0, len(waiting), self.most):
            self._one_pass(waiting[start : start + self.most])

    def _one_pass(self, seats: list[Seat]) -> None:
        """Forward and backward for these members; out of memory, in two halves."""
        fresh = not any(s.posted.trainer.losses for s in seats)  # no earlier micro-batch of the step has left gradients
        try:
            with instead(seats[0].posted.trainer.ways):
                answers = self._losses(seats)
                total = sum(s.posted.trainer.scaled(loss) for s, (loss, _) in zip(seats, answers))
                total.backward()
        except Exception as error:
            if not is_out(error):
                self._answer(seats, [error] * len(seats))
                return
            if len(seats) == 1 or not fresh:  # gradients of earlier micro-batches may have half of this one's in them
                self._answer(seats, [error] * len(seats))
                return
            answers = total = None
        if answers is not None:
            self._answer(seats, [(loss.detach(), count) for loss, count in answers])
            return
        for seat in seats:  # out here, where the error no longer holds what was computed
            seat.posted.trainer.model.zero_grad(set_to_none=True)
        freed()
        self.most = (len(seats) + 1) // 2
        log.info("%-14s out of memory; %d adapters a pass from here on", "joint", self.most)
        for start in range(0, len(seats), self.most):
            self._one_pass(seats[start : start + self.most])

    def _losses(self, seats: list[Seat]) -> list[tuple[Any, Any]]:
        batches = [(s.number, s.posted.inputs, s.posted.trainer.args.label_smoothing_factor) for s in seats]
        with seats[0].posted.trainer.accelerator.autocast():
            sums = losses(self.carrier, self.rows, batches)
        return [(loss / (count if s.posted.items is None else s.posted.items), count) for s, (loss, count) in zip(seats, sums)]

    def _answer(self, seats: list[Seat], answers: list[Any]) -> None:
        for seat, answer in zip(seats, answers):
            seat.posted, seat.answer = None, answer


def _random_state() -> tuple[Any, ...]:
    import numpy as np
    import torch

    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_random_state(state: tuple[Any, ...]) -> None:
    import numpy as np
    import torch

    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])
