"""Schedule a group of jointly trained runs: each member is a Trainer in its own greenlet, and one of them runs at a time.

    member 1   load, measure, attach ... batch -> waits     ... its own optimizer, logs, evaluation ... batch -> waits
    member 2                                        batch -> waits                                          ...
    leader                                                   one forward and backward pass for all that wait

A member sees what it would see alone: its own batches, random numbers (the global generators are swapped when its turn comes), schedule,
clipping, callbacks and run directory. Only the pass through the base is common. A member that ends early (early stopping, an error,
pruned) leaves; the others go on.

Greenlets, not threads: every thread that computes gets OpenMP worker threads of its own, and more of them than cores made the common pass
half as fast. Members switch only in `Member.step`, where no thread-local context of torch (no_grad, autocast) is open.
"""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from greenlet import getcurrent, greenlet

from ..common.errors import Preempted
from ..common.private_api import kept_accelerator_state, set_sync_gradients
from ..losses.answers import AnswerParts, ObjectiveLoss
from ..losses.packing import Packing
from ..losses.supervised import RowGroups
from ..sweeps.context import SharedBase
from ..sweeps.directory import PointResult
from ..system.memory import is_out_of_memory, passes_that_fit, release_memory
from ..training.trainer import BatchLoss, SupervisedTrainer
from .stacked_model import MemberBatch, RowOwners, joint_losses, stack_models

log = logging.getLogger("mmft")

@dataclass
class MicroBatch:
    """What a member hands to the leader. items: the divisor of its loss, the supervised tokens of the step. groups: of its sequences. answers:
    what its collator added for a preference objective.
    """

    trainer: SupervisedTrainer
    inputs: dict[str, Any]
    items: torch.Tensor | int | None
    groups: RowGroups | None
    answers: AnswerParts | None = None


class Member:
    """One run of the group: what its Trainer calls (JointMember), and how the leader wakes it."""

    def __init__(self, group: Group, number: int, name: str):
        self.group, self.number, self.name = group, number, name
        self.greenlet: greenlet | None = None
        self.waiting: MicroBatch | None = None
        self.answer: BatchLoss | BaseException | None = None
        self.random = _random_state()

    @property
    def ended(self) -> bool:
        return self.greenlet is not None and self.greenlet.dead

    @property
    def size(self) -> int:
        return self.group.size

    def step(
        self, trainer: SupervisedTrainer, inputs: dict[str, Any], items: torch.Tensor | int | None, groups: RowGroups | None, answers: AnswerParts | None = None
    ) -> BatchLoss:
        """Wait for the common pass. Raises what went wrong in it, or KeyboardInterrupt."""
        self.waiting = MicroBatch(trainer, inputs, items, groups, answers)
        state = trainer.accelerator.gradient_state  # shared by all Accelerators: a member that is ahead sets it for its next step
        sync_gradients = state.sync_gradients
        answer = self.group.leader.switch()
        set_sync_gradients(state, sync_gradients)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def log_step(self, step: int, steps: int, loss: str, time_left: str) -> None:
        """One line for the whole group, once every member has logged this step."""
        losses = self.group.logged.setdefault(step, {})
        losses[self.number] = loss
        if set(losses) >= {m.number for m in self.group.members if not m.ended}:
            shown = " ".join(losses[n] for n in sorted(losses))
            line = f"{self.group.label}step {step:{len(str(steps))}d}/{steps}  loss {shown}  {time_left} left"
            log.info(line, extra={"shown": True})  # the group's line, so it is in no member's own log
            del self.group.logged[step]


class Group:
    """Runs the members' jobs jointly. base: the shared base model. size: runs that are trained at once, here and in other processes.

    label: begins the group's log lines.
    """

    def __init__(self, base: SharedBase, names: Sequence[str], size: int | None = None, label: str = ""):
        self.base, self.leader, self.size, self.label = base, getcurrent(), size or len(names), label
        self.members = [Member(self, number, name) for number, name in enumerate(names)]
        self.owners = RowOwners()
        self.model: Any = None  # the stacked model, built at the first pass
        self.packing: Packing | None = None
        self.per_pass = len(names)  # members in one pass
        self.logged: dict[int, dict[int, str]] = {}
        self.stop: Preempted | None = None
        self.results: list[PointResult | None] = [None] * len(names)

    def run(self, jobs: Sequence[Callable[[Member], PointResult]]) -> list[PointResult]:
        """The results of all jobs. Raises KeyboardInterrupt, and what a job does not catch, after the other members were told."""
        for member, job in zip(self.members, jobs, strict=True):
            member.greenlet = greenlet(job)
        try:
            self._lead()
        except BaseException as error:
            for member in self.members:
                if member.greenlet and not member.ended:  # it leaves a directory that says what happened
                    member.answer = error
                    with contextlib.suppress(type(error)):
                        self._give_turn(member)
            raise
        finally:
            self.close()
        return [result for result in self.results if result is not None]

    def close(self) -> None:
        """Drop the stacked model."""
        self.model = self.packing = None

    def _lead(self) -> None:
        while living := [m for m in self.members if not m.ended]:
            for member in living:
                if member.waiting is None:
                    self._give_turn(member)
            waiting = [m for m in self.members if m.waiting is not None]
            if waiting:
                self._pass(waiting)
        if self.stop is not None:
            raise self.stop

    def _give_turn(self, member: Member) -> None:
        """Let one member run, with its own random numbers, until it waits for the next pass or ends."""
        outside = _random_state()
        _set_random_state(member.random)
        assert member.greenlet is not None
        try:
            answer, member.answer = member.answer, None
            # a greenlet is true once it has begun; its first value is the argument of its job
            with kept_accelerator_state():
                value = member.greenlet.switch(answer if member.greenlet else member)
        except Preempted as stop:  # this member has saved its checkpoint; the others save theirs, each after this same step
            self.stop, value = stop, None
        finally:
            member.random = _random_state()
            _set_random_state(outside)
        if member.ended:
            self.results[member.number] = value

    def _pass(self, members: list[Member]) -> None:
        """Passes for all waiting members, as many in one as memory allows."""
        if self.model is None:
            self._build_model(members)
        for start in range(0, len(members), self.per_pass):
            self._one_pass(members[start : start + self.per_pass])

    def _build_model(self, members: list[Member]) -> None:
        args = _batch(members[0]).trainer.args
        kwargs = {**(getattr(args, "gradient_checkpointing_kwargs", None) or getattr(args, "activation_checkpointing_kwargs", None) or {})}
        checkpointing = getattr(args, "gradient_checkpointing", False) or getattr(args, "activation_checkpointing", False)
        loaded = self.base.loaded
        assert loaded is not None
        trainers = {m.number: _batch(m).trainer for m in members}
        models, rewrites = {n: t.model for n, t in trainers.items()}, {n: t.rewrites for n, t in trainers.items()}
        self.model = stack_models(loaded.model, models, rewrites, self.owners, kwargs if checkpointing else None)
        self.packing = Packing(self.model) if _batch(members[0]).trainer.packing is not None else None
        self.per_pass = min(len(self.members), passes_that_fit(lambda: self._losses(members[:1]), loaded.device, len(members)))
        if self.per_pass < len(members):
            log.info("%-14s %d adapters a pass: more would not fit into memory", "joint", self.per_pass)

    def _one_pass(self, members: list[Member]) -> None:
        """Forward and backward pass for these members; after an out-of-memory error, in two halves."""
        first_micro_batch = not any(_batch(m).trainer.losses for m in members)  # no earlier micro-batch of the step has left gradients
        answers: list[BatchLoss] | None = None
        try:
            answers = self._losses(members)
            total: Any = sum(_batch(m).trainer.scaled(answer.loss) for m, answer in zip(members, answers))
            total.backward()
        except Exception as error:
            # after an earlier micro-batch, gradients may already hold half of this one's
            if not is_out_of_memory(error) or len(members) == 1 or not first_micro_batch:
                self._answer(members, [error] * len(members))
                return
            answers = total = None
        if answers is not None:
            self._answer(members, [a._replace(loss=a.loss.detach(), total=a.total.detach()) for a in answers])
            return
        for member in members:  # outside the handler, where the error no longer holds the tensors
            _batch(member).trainer.model.zero_grad(set_to_none=True)
        release_memory()
        self.per_pass = (len(members) + 1) // 2
        log.info("%-14s out of memory; %d adapters a pass from here on", "joint", self.per_pass)
        for start in range(0, len(members), self.per_pass):
            self._one_pass(members[start : start + self.per_pass])

    def _losses(self, members: list[Member]) -> list[BatchLoss]:
        own = [_batch(m) for m in members]
        batches = [MemberBatch(m.number, b.inputs, b.trainer.args.label_smoothing_factor, b.groups, b.trainer.objective, b.answers) for m, b in zip(members, own)]
        with own[0].trainer.accelerator.autocast():
            sums = joint_losses(self.model, self.owners, batches, self.packing)
        return [
            BatchLoss.of(found, b.items) if isinstance(found, ObjectiveLoss) else
            BatchLoss(found.total / (found.count if b.items is None else b.items), found.count, found.total, found.by_group)
            for b, found in zip(own, sums)
        ]  # fmt: skip

    def _answer(self, members: Sequence[Member], answers: Sequence[BatchLoss | BaseException]) -> None:
        for member, answer in zip(members, answers):
            member.waiting, member.answer = None, answer


def _batch(member: Member) -> MicroBatch:
    assert member.waiting is not None
    return member.waiting


RandomState = tuple[torch.Tensor, "list[torch.Tensor] | None", Any, Any]


def _random_state() -> RandomState:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _set_random_state(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state_all(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])
