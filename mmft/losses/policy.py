"""Grpo: reinforcement learning from rewards of sampled answers, as settings of TRL's GRPOTrainer, which computes the loss."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..common.errors import UserError, nearest
from .objectives import Objective

CHOICES = {
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "importance_sampling_level": ("token", "sequence"),
}
LEAST = {"num_generations": 2, "num_iterations": 1, "steps_per_generation": 1, "max_completion_length": 1, "top_k": 0}
SHARES = ("top_p", "min_p", "top_entropy_quantile")


@dataclass(kw_only=True)
class Grpo(Objective):
    """Group relative policy optimisation: Shao et al., "DeepSeekMath", 2024, equation 3, and the variants of it that TRL has.

    The keys are those of trl.GRPOConfig with its defaults; `reward_funcs` is the argument of trl.GRPOTrainer, with names of metrics' scores in
    place of functions. max_completion_length: auto is replaced by a number before training. Raises UserError for values that cannot be.
    """

    NAME: ClassVar[str] = "grpo"
    PREFERENCE: ClassVar[bool] = False
    REFERENCE: ClassVar[bool] = False
    PAIRS: ClassVar[bool] = False
    reward_funcs: list[str] = field(default_factory=lambda: ["exact_match"])
    reward_weights: list[float] | None = None
    num_generations: int = 8
    max_completion_length: int | str = "auto"
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    generation_kwargs: dict[str, Any] | None = None
    shuffle_dataset: bool = True
    loss_type: str = "dapo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    scale_rewards: str = "group"
    multi_objective_aggregation: str = "sum_then_normalize"
    importance_sampling_level: str = "token"
    num_iterations: int = 1
    steps_per_generation: int | None = None
    mask_truncated_completions: bool = False
    top_entropy_quantile: float = 1.0
    entropy_coef: float = 0.0
    use_adaptive_entropy: bool = False
    entropy_coef_min: float = 0.0
    entropy_coef_max: float = 1.0
    entropy_coef_delta: float = 0.005
    entropy_target: float = 0.2
    off_policy_mask_threshold: float | None = None
    use_bias_correction_kl: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        self.reward_funcs = [self.reward_funcs] if isinstance(self.reward_funcs, str) else [str(name) for name in self.reward_funcs or ()]
        if not self.reward_funcs or len(set(self.reward_funcs)) < len(self.reward_funcs):
            raise UserError(f"objective.reward_funcs={_shown(self.reward_funcs)}: must be names of scores, each once, e.g. [exact_match]")
        if self.reward_weights is not None and (
            not isinstance(self.reward_weights, list) or len(self.reward_weights) != len(self.reward_funcs) or not all(map(_is_finite, self.reward_weights))
        ):
            raise UserError(f"objective.reward_weights={_shown(self.reward_weights)}: must be a number for each of reward_funcs={_shown(self.reward_funcs)}")
        for key, known in CHOICES.items():
            value = {True: "group", False: "none"}.get(getattr(self, key), getattr(self, key)) if key == "scale_rewards" else getattr(self, key)
            if value not in known:
                raise UserError(f"objective.{key}={value}: must be {', '.join(known[:-1])} or {known[-1]}.{nearest(str(value), known)}")
        if isinstance(self.max_completion_length, str) and self.max_completion_length != "auto":
            raise UserError(f"objective.max_completion_length={self.max_completion_length}: must be a number of tokens, or auto")
        for key, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not 0 <= value < math.inf:
                raise UserError(f"objective.{key}={value}: must be a number from 0 upwards")
            if key in LEAST and value < LEAST[key]:
                raise UserError(f"objective.{key}={value}: must be {LEAST[key]} or more")
            if key in SHARES and value > 1:
                raise UserError(f"objective.{key}={value}: must be between 0 and 1")
        for key in ("temperature", "repetition_penalty", "top_p"):
            if not getattr(self, key) > 0:
                raise UserError(f"objective.{key}={getattr(self, key)}: must be above 0")

    def arguments(self, longest: int | None) -> dict[str, Any]:
        """The keys of trl.GRPOConfig. longest: tokens of an answer where max_completion_length is auto. Raises UserError if it is needed and not known."""
        if self.max_completion_length == "auto" and longest is None:
            raise UserError("objective.max_completion_length=auto: generation bounds answers in another way than by max_new_tokens; give a number of tokens")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "reward_funcs"}
        return {**values, "max_completion_length": longest if self.max_completion_length == "auto" else self.max_completion_length}


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _shown(values: Any) -> str:
    return f"[{','.join(map(str, values))}]" if isinstance(values, list) else str(values)
