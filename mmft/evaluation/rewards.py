"""Reward: a metric's score of one sampled answer as a function for TRL's GRPOTrainer, which names a row whose score is no number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from ..collators.types import BatchMaker
from ..common.errors import UserError, nearest
from ..data.sample import Sample
from .evaluate import answer_record
from .generate import Answer
from .metrics.base import Metric, MetricSet, problem_of, unanswered


class Reward:
    """The score `name` of a metric, with its sign turned where lower is better, so that more is always better.

    rows: the training rows, which a prompt of the trainer names by their numbers. collator: reads the answers as evaluation does.
    """

    def __init__(self, name: str, key: str, metric: Metric, higher_is_better: bool):
        self.__name__ = name  # the trainer logs it as rewards/NAME/mean
        self.key, self.metric, self.sign = key, metric, 1.0 if higher_is_better else -1.0
        self.rows: Sequence[Sample] = ()
        self.collator: BatchMaker | None = None

    def reads(self, rows: Sequence[Sample], collator: BatchMaker) -> None:
        """Say which rows prompts are, and how answers are read."""
        self.rows, self.collator = rows, collator

    def problem(self, row: Sample) -> str | None:
        """Why no answer to this row can have this reward; None if it can."""
        return problem_of(self.metric, unanswered(row))

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], row: Sequence[int], **_: Any) -> list[float | None]:
        """The reward of each sampled answer; None, which the trainer leaves out, for a row that the metric does not score.

        completion_ids: the tokens of each answer. row: the number of its row. Raises UserError for a score that is no finite number.
        """
        assert self.collator is not None
        texts = self.collator.decode([list(ids) for ids in completion_ids])
        ends = set(self.collator.end_ids)
        answers = [Answer(text, not ids or ids[-1] not in ends) for text, ids in zip(texts, completion_ids, strict=True)]
        return [self.of(self.rows[number], answer) for number, answer in zip(row, answers, strict=True)]

    def of(self, row: Sample, answer: Answer) -> float | None:
        """The reward of one answer. Raises UserError."""
        assert self.collator is not None
        record = answer_record(self.collator, 0, row, answer)
        if problem_of(self.metric, record) is not None:
            return None
        where = f"objective.reward_funcs: {self.__name__} (metrics.{self.key}) of row {row.id}"
        try:
            values: Any = self.metric.row(record)
            value: Any = values[self.__name__]
        except KeyError:
            raise UserError(f"{where}: has no value for the answer {_quoted(answer.text)}; a reward must be a number for every answer") from None
        except Exception as error:  # a metric may be a user's own code
            raise UserError(f"{where}: {type(error).__name__}: {' '.join(str(error).split())[:200]} (the answer: {_quoted(answer.text)})") from None
        if not isinstance(value, Real) or not math.isfinite(value):
            raise UserError(f"{where}: is {' '.join(repr(value).split())[:80]}, not a finite number (the answer: {_quoted(answer.text)})")
        return self.sign * float(value)


def rewards_of(names: Sequence[str], metrics: MetricSet) -> list[Reward]:
    """The rewards that `objective.reward_funcs` names. metrics: of the run. Raises UserError for a score that no metric gives to one answer."""
    found = []
    for name in names:
        where = f"objective.reward_funcs={name}"
        known = {score.name: (key, metric, score) for key, metric in metrics.metrics.items() for score in metric.scores}
        if name not in known:
            raise UserError(f"{where}: no metric of this run gives that score.{nearest(name, known)} There are: {', '.join(known)}; metrics=[...] adds others")
        key, metric, score = known[name]
        if metric.NEEDS_PROBABILITIES:
            raise UserError(f"{where}: {key} needs the probabilities of choices, and answers are sampled here; name another score")
        if type(metric).row is Metric.row:
            raise UserError(f"{where}: {key} has a value of all rows together, none of one answer; name another score")
        found.append(Reward(name, key, metric, score.higher_is_better))
    return found


def check_rewards(rewards: Sequence[Reward], rows: Sequence[Sample]) -> None:
    """Raises UserError if no reward can score some row, whatever its answer is, or a reward can score none."""
    without: list[tuple[str, str]] = []
    scored = [0] * len(rewards)
    for i in range(len(rows)):
        problems = [reward.problem(rows[i]) for reward in rewards]
        scored = [n + (problem is None) for n, problem in zip(scored, problems)]
        if all(problems):
            without.append((rows[i].id, str(problems[0])))
    if without:
        names = ",".join(reward.__name__ for reward in rewards)
        raise UserError(f"objective.reward_funcs=[{names}]: {len(without)} of {len(rows)} rows of train can have no reward: row {without[0][0]} {without[0][1]}")
    for reward, n in zip(rewards, scored):
        if not n:
            raise UserError(f"objective.reward_funcs={reward.__name__}: scores none of the {len(rows)} rows of train: row {rows[0].id} {reward.problem(rows[0])}; leave it out")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
