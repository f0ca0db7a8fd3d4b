"""Objectives: what training learns from a row, a class for each option of the group `objective`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ..collators.answers import CHOSEN, REJECTED
from ..common.errors import UserError
from . import preference

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Answers:
    """The answers of a batch, each (B,). policy: log-probabilities of their supervised tokens. reference: the same of the reference model;
    zeros where the objective has none. tokens: how many these are. kind: CHOSEN or REJECTED; of a pair the chosen one comes first.
    mismatched: (B,) log-ratios of answers of other rows, for KTO.
    """

    policy: torch.Tensor
    reference: torch.Tensor
    tokens: torch.Tensor
    kind: torch.Tensor
    mismatched: torch.Tensor | None = None

    def of(self, kind: int) -> Answers:
        """The answers of one kind, in their order."""
        own = self.kind == kind
        return Answers(self.policy[own], self.reference[own], self.tokens[own], self.kind[own])

    @property
    def log_ratios(self) -> torch.Tensor:
        return self.policy - self.reference


class Objective:
    """An objective is a subclass of this and a yaml file in conf/objective/; the constructor's arguments are the yaml's keys.

    A subclass for preferences implements `losses`. NAME: of its yaml. PREFERENCE: rows have several answers. REFERENCE: it compares with the
    log-probabilities of a reference model. PAIRS: it needs a rejected answer in every row, not only a label. `beta` scales rewards.
    """

    NAME: ClassVar[str]
    PREFERENCE: ClassVar[bool] = True
    REFERENCE: ClassVar[bool] = True
    PAIRS: ClassVar[bool] = True
    MISMATCHED: ClassVar[bool] = False

    def units(self, kind: torch.Tensor) -> torch.Tensor:
        """(B,) bool: the answers that stand for a loss of their own. kind: see Answers."""
        return kind == CHOSEN if self.PAIRS else kind >= 0

    def losses(self, answers: Answers) -> torch.Tensor:
        """(n,): the loss of each pair, or of each answer where PAIRS is false. The mean is trained."""
        raise NotImplementedError

    def rewards(self, answers: Answers) -> torch.Tensor:
        """(B,): how good the model finds each answer: beta times its log-ratio, or without a reference times the mean log-probability of a token."""
        beta: float = vars(self)["beta"]
        return beta * (answers.log_ratios if self.REFERENCE else answers.policy / answers.tokens)

    def __post_init__(self) -> None:
        """Raises UserError for a beta that is not above 0, or a weight or margin below 0. A subclass that is a dataclass calls it when it is created."""
        for key, value in vars(self).items():
            if key.startswith("beta") and not value > 0:
                raise UserError(f"objective.{key}={value}: must be above 0")
            if not 0 <= value < math.inf:
                raise UserError(f"objective.{key}={value}: must be a number from 0 upwards")


@dataclass(kw_only=True)
class Sft(Objective):
    """The cross entropy of a row's answers (losses/supervised.py). A rejected answer is not read."""

    NAME: ClassVar[str] = "sft"
    PREFERENCE: ClassVar[bool] = False
    REFERENCE: ClassVar[bool] = False
    PAIRS: ClassVar[bool] = False


@dataclass(kw_only=True)
class Dpo(Objective):
    """See preference.dpo."""

    NAME: ClassVar[str] = "dpo"
    beta: float = 0.1

    def losses(self, answers: Answers) -> torch.Tensor:
        chosen, rejected = answers.of(CHOSEN), answers.of(REJECTED)
        return preference.dpo(chosen.policy, rejected.policy, chosen.reference, rejected.reference, self.beta)


@dataclass(kw_only=True)
class Ipo(Objective):
    """See preference.ipo."""

    NAME: ClassVar[str] = "ipo"
    beta: float = 0.1

    def losses(self, answers: Answers) -> torch.Tensor:
        chosen, rejected = answers.of(CHOSEN), answers.of(REJECTED)
        return preference.ipo(chosen.policy, rejected.policy, chosen.reference, rejected.reference, chosen.tokens, rejected.tokens, self.beta)


@dataclass(kw_only=True)
class SimPo(Objective):
    """See preference.simpo. gamma: the margin by which the reward of the chosen answer should be larger."""

    NAME: ClassVar[str] = "simpo"
    REFERENCE: ClassVar[bool] = False
    beta: float = 2.0
    gamma: float = 1.0

    def losses(self, answers: Answers) -> torch.Tensor:
        chosen, rejected = answers.of(CHOSEN), answers.of(REJECTED)
        return preference.simpo(chosen.policy, rejected.policy, chosen.tokens, rejected.tokens, self.beta, self.gamma)


@dataclass(kw_only=True)
class Orpo(Objective):
    """See preference.orpo. beta: the weight of the odds ratio (lambda in the paper)."""

    NAME: ClassVar[str] = "orpo"
    REFERENCE: ClassVar[bool] = False
    beta: float = 0.1

    def losses(self, answers: Answers) -> torch.Tensor:
        chosen, rejected = answers.of(CHOSEN), answers.of(REJECTED)
        return preference.orpo(chosen.policy, rejected.policy, chosen.tokens, rejected.tokens, self.beta)


@dataclass(kw_only=True)
class Kto(Objective):
    """See preference.kto. desirable_weight, undesirable_weight: of good and bad answers, for data that has more of one kind."""

    NAME: ClassVar[str] = "kto"
    PAIRS: ClassVar[bool] = False
    MISMATCHED: ClassVar[bool] = True
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def losses(self, answers: Answers) -> torch.Tensor:
        assert answers.mismatched is not None
        kl = preference.mismatched_kl(answers.mismatched)
        return preference.kto(answers.log_ratios, answers.kind == CHOSEN, kl, self.beta, self.desirable_weight, self.undesirable_weight)


@dataclass(kw_only=True)
class Mpo(Objective):
    """See preference.mpo. The weights are those of its three parts."""

    NAME: ClassVar[str] = "mpo"
    beta: float = 0.1
    preference_weight: float = 0.8
    quality_weight: float = 0.2
    generation_weight: float = 1.0

    def losses(self, answers: Answers) -> torch.Tensor:
        chosen, rejected = answers.of(CHOSEN), answers.of(REJECTED)
        return preference.mpo(chosen.policy, rejected.policy, chosen.reference, rejected.reference, chosen.tokens, self.beta,
                              self.preference_weight, self.quality_weight, self.generation_weight)  # fmt: skip
