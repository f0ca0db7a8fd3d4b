"""PreferenceEvaluator: how well a model tells good answers from bad ones on held-out rows, and how far it is from the reference model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..collators.answers import CHOSEN, REJECTED, AnswerCollator, other_answers
from ..collators.base import IGNORE
from ..collators.types import Batch
from ..common.records import MetricInfo, MetricValues
from ..common.tensors import eval_mode, to_device
from ..config.choices import PREFERENCE_SCORES
from ..data.sample import Sample
from ..losses.answers import AnswerParts, in_order, log_probs, mismatched_log_ratios, take_answers
from ..losses.objectives import Answers, Objective
from ..losses.supervised import supervised_logits

if TYPE_CHECKING:
    import torch

log = logging.getLogger("mmft")

LABELS = {"reward_accuracy": "Reward accuracy", "reward_margin": "Reward margin", "preference_loss": "Preference loss", "kl": "KL to the reference"}
AsReference = Callable[[Any], AbstractContextManager[Any]]
CHUNK = 256  # tokens whose distributions are compared at once, which limits memory


@dataclass
class PreferenceEvaluator:
    """rows: held-out rows with preferences. batch_size: rows in one batch. as_reference: makes the trained model the reference inside a block, so
    that the KL divergence can be measured; None where it cannot be made that.
    """

    rows: Sequence[Sample]
    collator: AnswerCollator
    objective: Objective
    batch_size: int
    as_reference: AsReference | None

    def measure(self, model: Any) -> MetricValues:
        """The scores of a model, by the names of PREFERENCE_SCORES.

        reward_accuracy: the share of pairs whose chosen answer has the larger reward; without pairs, of all pairs of a good and a bad answer
        of any rows. Equal rewards count half, so a model that is its own reference has 0.5. reward_margin: mean reward of good minus that of
        bad answers. preference_loss: the objective's own loss. kl: mean over the tokens of good answers of KL(model || reference) between
        the distributions of the next token.
        """
        import torch

        answers: list[Answers] = []
        losses: list[torch.Tensor] = []
        divergence, tokens = 0.0, 0
        with torch.no_grad(), eval_mode(model):
            for batch in self._batches():
                batch = to_device(batch, model.device)
                batch.pop("row_ids")
                parts = take_answers(batch)
                assert parts is not None
                logits, targets, keep = supervised_logits(model, batch)
                found = self._answers(parts, logits, targets, keep, mismatched_log_ratios(model, parts))
                answers.append(found)
                losses.append(self.objective.losses(found).cpu())
                if self.as_reference is not None and hasattr(model, "disable_adapter"):
                    with self.as_reference(model):
                        reference = supervised_logits(model, batch)[0]
                    good = (found.kind == CHOSEN).repeat_interleave(found.tokens)
                    divergence += _divergence(logits[good], reference[good])
                    tokens += int(good.sum())
        values = self._scores(answers, losses)
        return values | {"kl": divergence / tokens} if tokens else values

    def measure_reference(self) -> MetricValues:
        """The scores of the reference model itself, whose log-probabilities are known; for an objective that has them."""
        import torch

        answers, losses = [], []
        for batch in self._batches():
            parts = take_answers(batch)
            assert parts is not None
            tokens = (batch["labels"][:, 1:] != IGNORE).sum(dim=1)
            mismatched = None if parts.mismatched is None else torch.zeros(len(parts.kind))
            answers.append(Answers(parts.reference, parts.reference, tokens, parts.kind, mismatched))
            losses.append(self.objective.losses(answers[-1]))
        return {**self._scores(answers, losses), "kl": 0.0}

    def info(self, measured: MetricValues) -> dict[str, MetricInfo]:
        """What a report has to know of the scores that were measured."""
        tops = {"reward_accuracy": 1.0}
        return {name: {"label": LABELS[name], "higher_is_better": higher, "top": tops.get(name)} for name, higher in PREFERENCE_SCORES.items() if name in measured}

    def _batches(self) -> Iterator[Batch]:
        for start in range(0, len(self.rows), self.batch_size):
            yield self.collator([self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))])

    def _answers(self, parts: AnswerParts, logits: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor, mismatched: torch.Tensor | None) -> Answers:
        policy, tokens = log_probs(logits, targets, keep)
        return Answers(policy, parts.reference.to(policy.device), tokens, parts.kind.to(policy.device), mismatched)

    def _scores(self, answers: Sequence[Answers], losses: Sequence[torch.Tensor]) -> MetricValues:
        import torch

        rewards = torch.cat([self.objective.rewards(found).double().cpu() for found in answers])
        kind = torch.cat([found.kind.cpu() for found in answers])
        good, bad = rewards[kind == CHOSEN], rewards[kind == REJECTED]
        values: MetricValues = {"preference_loss": float(torch.cat(list(losses)).double().mean())}
        if len(good) and len(bad):
            one, other = (good, bad) if self.objective.PAIRS else (good[:, None], bad[None])
            values |= {"reward_accuracy": float(in_order(one, other).mean()), "reward_margin": float(good.mean() - bad.mean())}
        return values


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """The model without its adapter inside a block: the reference where nothing else was trained before."""
    context: AbstractContextManager[Any] = model.disable_adapter()
    return context


def evaluator_of(
    objective: Objective, model: Any, collator: Any, rows: Sequence[Sample], batch_size: int, as_reference: AsReference | None = without_adapter
) -> PreferenceEvaluator | None:
    """An evaluator of a finished run's model on any rows; None, after saying why, where preferences cannot be measured.

    as_reference: see PreferenceEvaluator.
    """
    usable = len(rows) and all(rows[i].rejected or not objective.PAIRS and rows[i].label is not None for i in range(len(rows)))
    as_reference = as_reference if hasattr(model, "disable_adapter") else None
    if not usable or objective.REFERENCE and as_reference is None:
        why = f"objective={objective.NAME} needs a rejected answer in every row" if not usable else "the reference model cannot be had any more"
        log.info("%-14s not measured: %s", "preferences", why)
        return None
    answers = AnswerCollator(collator, other_answers(rows) if objective.MISMATCHED else None)
    if objective.REFERENCE and as_reference is not None:
        with as_reference(model):
            answers.reference = reference_log_probs(model, answers, rows, batch_size, True)
    return PreferenceEvaluator(rows, answers, objective, batch_size, as_reference)


def _divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The sum over n tokens of KL(softmax(logits) || softmax(reference)). logits, reference (n, V)."""
    total = 0.0
    for own, other in zip(logits.split(CHUNK), reference.split(CHUNK)):
        own, other = own.float().log_softmax(-1), other.float().log_softmax(-1)
        total += float((own.exp() * (own - other)).sum().double())
    return total


def reference_log_probs(model: Any, collator: AnswerCollator, rows: Sequence[Sample], batch_size: int, progress: bool) -> dict[str, float]:
    """content of a row with one of its answers -> log-probability of that answer, of all answers that `collator` makes of these rows."""
    import torch
    from tqdm import tqdm

    values: dict[str, float] = {}
    starts = range(0, len(rows), batch_size)
    with torch.no_grad(), eval_mode(model):
        for start in tqdm(starts, desc="reference", leave=False, disable=None if progress and len(starts) > 1 else True):
            part = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            answers = [answer for sample in part for answer in [a for a, _ in collator.answers(sample)] + collator.mismatched(sample)]
            missing = list({answer.content: answer for answer in answers if answer.content not in values}.values())
            if missing:
                batch = to_device({k: v for k, v in collator.collator(missing).items() if k != "row_ids"}, model.device)
                own = log_probs(*supervised_logits(model, batch))[0]
                values.update(zip((answer.content for answer in missing), own.tolist(), strict=True))
    return values
