"""Preference losses as functions of the log-probabilities of answers. None of them needs a model.

Everywhere: chosen, rejected (n,): log-probabilities of the answers of n pairs, the end token included. reference_*: the same of the
reference model. The log-ratio of an answer is log p(answer) - log p_reference(answer). tokens: supervised tokens of an answer. Each returns
(n,), one loss a pair or an answer; the mean is what is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def dpo(chosen: torch.Tensor, rejected: torch.Tensor, reference_chosen: torch.Tensor, reference_rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """-log sigmoid(beta x (chosen log-ratio - rejected log-ratio)): Rafailov et al., "Direct Preference Optimization", 2023, equation 7."""
    import torch.nn.functional as F

    return -F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def ipo(
    chosen: torch.Tensor, rejected: torch.Tensor, reference_chosen: torch.Tensor, reference_rejected: torch.Tensor,
    chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor, beta: float,
) -> torch.Tensor:  # fmt: skip
    """(difference of the log-ratios - 1 / (2 beta))^2: Azar et al., "A General Theoretical Paradigm ...", 2023, equation 17, with beta for tau.

    The log-ratios are means over the tokens of an answer, as the authors compute them; sums would make beta depend on the length.
    """
    difference = (chosen - reference_chosen) / chosen_tokens - (rejected - reference_rejected) / rejected_tokens
    return (difference - 1 / (2 * beta)) ** 2


def simpo(
    chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor, beta: float, gamma: float
) -> torch.Tensor:
    """-log sigmoid(beta x (difference of the mean log-probabilities) - gamma): Meng et al., "SimPO", 2024, equation 6. No reference."""
    import torch.nn.functional as F

    return -F.logsigmoid(beta * (chosen / chosen_tokens - rejected / rejected_tokens) - gamma)


def orpo(chosen: torch.Tensor, rejected: torch.Tensor, chosen_tokens: torch.Tensor, rejected_tokens: torch.Tensor, beta: float) -> torch.Tensor:
    """Cross entropy of the chosen answers, and -beta x log sigmoid(log of the odds ratio): Hong et al., "ORPO", 2024, equations 6 and 7.

    The odds are of the geometric mean of an answer's token probabilities. The cross entropy is the mean over all chosen tokens of the batch.
    """
    import torch.nn.functional as F

    mean_chosen, mean_rejected = chosen / chosen_tokens, rejected / rejected_tokens
    log_odds = (mean_chosen - mean_rejected) - (log_one_minus_exp(mean_chosen) - log_one_minus_exp(mean_rejected))
    return cross_entropy(chosen, chosen_tokens) - beta * F.logsigmoid(log_odds)


def kto(log_ratios: torch.Tensor, desirable: torch.Tensor, kl: torch.Tensor, beta: float, desirable_weight: float, undesirable_weight: float) -> torch.Tensor:
    """Ethayarajh et al., "KTO", 2024, equation 7, without its constant lambda_y: weight x (1 - sigmoid(+-beta x (log-ratio - kl))).

    log_ratios (n,): of answers. desirable (n,): bool. kl: the estimate of `mismatched_kl`.
    """
    import torch

    good = desirable.to(log_ratios.dtype)
    signs, weights = 2 * good - 1, desirable_weight * good + undesirable_weight * (1 - good)
    return weights * (1 - torch.sigmoid(signs * beta * (log_ratios - kl)))


def mismatched_kl(log_ratios: torch.Tensor) -> torch.Tensor:
    """KTO's estimate of KL(policy || reference), 0-d, at least 0, without a gradient. log_ratios (n,): of answers to other prompts."""
    return log_ratios.detach().mean().clamp(min=0)


def mpo(
    chosen: torch.Tensor, rejected: torch.Tensor, reference_chosen: torch.Tensor, reference_rejected: torch.Tensor, chosen_tokens: torch.Tensor,
    beta: float, preference_weight: float, quality_weight: float, generation_weight: float,
) -> torch.Tensor:  # fmt: skip
    """Wang et al., "Enhancing the Reasoning Ability ... via Mixed Preference Optimization", 2024, equation 1: `dpo` for which answer is better,
    a binary classifier for how good each is (BCO, Jung et al., 2024, with a reward shift of 0), and the cross entropy of the chosen answers.
    """
    import torch.nn.functional as F

    preference = dpo(chosen, rejected, reference_chosen, reference_rejected, beta)
    quality = -F.logsigmoid(beta * (chosen - reference_chosen)) - F.logsigmoid(-beta * (rejected - reference_rejected))
    return preference_weight * preference + quality_weight * quality + generation_weight * cross_entropy(chosen, chosen_tokens)


def cross_entropy(chosen: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Mean loss of a token over all answers, 0-d: answers with more tokens weigh more."""
    return -chosen.sum() / tokens.sum()


def log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends. A probability of 1 is read as one rounding step below it, so that its odds are finite."""
    import math

    import torch

    x = x.clamp(max=-torch.finfo(x.dtype).eps)
    near = x > -math.log(2)
    # each branch gets only values in its range, because a NaN in the branch that is not chosen would reach the gradient
    return torch.where(near, torch.log(-torch.expm1(x.where(near, x.new_tensor(-0.5)))), torch.log1p(-torch.exp(x.where(~near, x.new_tensor(-1.0)))))
