"""Log-probabilities of the answers of a batch, and the objective's loss on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..collators.answers import CHOSEN, KIND, MISMATCHED, REFERENCE, REJECTED
from .objectives import Answers, Objective
from .supervised import RowGroups, supervised_logits

if TYPE_CHECKING:
    import torch

ROUNDING = 1e-5  # of rewards: the same log-probability computed in two batches differs by less


class AnswerParts(NamedTuple):
    """What an AnswerCollator adds to a batch: see collators.answers."""

    kind: torch.Tensor
    reference: torch.Tensor
    mismatched: dict[str, Any] | None


class ObjectiveLoss(NamedTuple):
    """total: sum of the losses, with gradient. units: how many there are. tokens: supervised tokens. by_group: (groups, 2), the sum of the
    losses of each group and their number. group_tokens: (groups,) int64. rewards: see `reward_sums`.
    """

    total: torch.Tensor
    units: torch.Tensor
    tokens: torch.Tensor
    by_group: torch.Tensor | None
    group_tokens: torch.Tensor | None
    rewards: torch.Tensor


def take_answers(batch: dict[str, Any]) -> AnswerParts | None:
    """Take what an AnswerCollator added out of a batch, in place; None for a batch of any other collator."""
    return AnswerParts(batch.pop(KIND), batch.pop(REFERENCE), batch.pop(MISMATCHED, None)) if KIND in batch else None


def log_probs(logits: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the log-probabilities of its supervised tokens, their number) of each of the B sequences, float32 and int64.

    logits (n, V), targets (n,), keep (B, S): as `supervised_logits` returns them.
    """
    import torch
    import torch.nn.functional as F

    losses = F.cross_entropy(logits.float(), targets.to(logits.device), reduction="none")
    tokens = keep.sum(dim=1)
    # not index_add, whose sums on a GPU change from one call to the next
    return torch.stack([-part.sum() for part in losses.split(tokens.tolist())]), tokens.to(logits.device)


def answer_log_probs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """(B,) log-probabilities of the answers of a batch, which may hold what an AnswerCollator adds."""
    return log_probs(*supervised_logits(model, {k: v for k, v in batch.items() if k not in (KIND, REFERENCE, MISMATCHED)}))[0]


def mismatched_log_ratios(model: Any, parts: AnswerParts) -> torch.Tensor | None:
    """(B,) log-ratios of the mismatched answers, without gradients; None for an objective that has none."""
    import torch

    if parts.mismatched is None:
        return None
    with torch.no_grad():
        policy = answer_log_probs(model, parts.mismatched)
        return policy - parts.mismatched[REFERENCE].to(policy.device)


def objective_loss(
    objective: Objective, parts: AnswerParts, logits: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor, mismatched: torch.Tensor | None = None,
    groups: RowGroups | None = None,
) -> ObjectiveLoss:  # fmt: skip
    """The loss of a batch of answers. logits, targets, keep: as `supervised_logits` returns them. mismatched: see Answers. groups: of its sequences."""
    import torch
    import torch.nn.functional as F

    policy, tokens = log_probs(logits, targets, keep)
    kind, reference = parts.kind.to(policy.device), parts.reference.to(policy.device)
    answers = Answers(policy, reference, tokens, kind, mismatched)
    losses = objective.losses(answers)
    by_group = group_tokens = None
    if groups is not None:
        member = F.one_hot(groups.index.to(policy.device), groups.count)
        own = member[objective.units(kind)].float()
        by_group, group_tokens = torch.stack([own.T @ losses.detach(), own.sum(dim=0)], dim=1), (member * tokens[:, None]).sum(dim=0)
    return ObjectiveLoss(losses.sum(), kind.new_tensor(len(losses)), tokens.sum(), by_group, group_tokens, reward_sums(objective, answers))


def in_order(good: torch.Tensor, bad: torch.Tensor) -> torch.Tensor:
    """1 where the good answer's reward is larger, 0 where it is smaller, 0.5 where they differ by no more than rounding."""
    import torch

    return torch.where((good - bad).abs() <= ROUNDING, 0.5, (good > bad).to(good.dtype))


def reward_sums(objective: Objective, answers: Answers) -> torch.Tensor:
    """(6,) float32, without gradient: the sum of the rewards of chosen answers and their number, of rejected ones and their number, pairs in
    which the chosen answer has the larger reward (half a pair where both are equal) and the number of pairs.
    """
    import torch

    with torch.no_grad():
        rewards = objective.rewards(answers)
        chosen, rejected = rewards[answers.kind == CHOSEN], rewards[answers.kind == REJECTED]
        right = in_order(chosen, rejected) if objective.PAIRS else chosen[:0]
        parts = [chosen.sum(), chosen.new_tensor(len(chosen)), rejected.sum(), chosen.new_tensor(len(rejected)), right.sum(), chosen.new_tensor(len(right))]
        return torch.stack(parts).float()
