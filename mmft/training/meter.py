"""What training counts: the loss since the last log, supervised tokens, skipped steps, time."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TypedDict

import torch

from ..system.distributed import is_main, total
from .source_meter import SourceMeter, SourceState


class MeterState(TypedDict):
    """A meter in a checkpoint."""

    loss: float
    steps: int
    logged_loss: float
    supervised_tokens: int
    skipped: int
    train_seconds: float
    sources: SourceState | None  # of a mix
    rewards: list[float]  # of a preference objective; absent in checkpoints of earlier versions


@dataclass
class Meter:
    """Counts of one training, over all parts of a resumed run.

    loss: sum of the losses of the steps since the last log, summed in fp32 as the Trainer does. steps: how many these are. logged_loss:
    sum of all losses before. sources: of a mix, the same by source. rewards: (6,), losses.answers.reward_sums since the last log, on this process. earlier_seconds: training time of earlier parts. first_step: the step this part began at.
    """

    device: torch.device
    loss: torch.Tensor = field(init=False)
    rewards: torch.Tensor = field(init=False)
    steps: int = 0
    logged_loss: float = 0.0
    supervised_tokens: torch.Tensor | int = 0
    sources: SourceMeter | None = None
    skipped: int = 0
    earlier_seconds: float = 0.0
    first_step: int = 0
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.loss = torch.tensor(0.0, device=self.device)
        self.rewards = torch.zeros(6, device=self.device)

    @property
    def seconds(self) -> float:
        """Training time of all parts, in seconds."""
        return self.earlier_seconds + time.time() - self.started

    def drain(self, loss_sum: float) -> float | None:
        """The mean loss of a step since the last log, and begin anew; None without a step. loss_sum: over all processes."""
        mean = loss_sum / self.steps if self.steps else None
        self.logged_loss += loss_sum
        self.loss -= self.loss
        self.steps = 0
        return mean

    def drain_rewards(self) -> dict[str, float]:
        """Mean reward of good minus that of bad answers, and the share of pairs in the right order, since the last log; {} without any."""
        good, n_good, bad, n_bad, right, pairs = torch.as_tensor(total(self.rewards)).tolist()
        self.rewards.zero_()
        values = {"reward_margin": good / n_good - bad / n_bad} if n_good and n_bad else {}
        return {**values, "reward_accuracy": right / pairs} if pairs else values

    def state(self, supervised_tokens: int, sources: SourceState | None, rewards: list[float]) -> MeterState:
        """For a checkpoint. supervised_tokens, sources, rewards: of all processes."""
        return {
            "loss": self.loss.item(), "steps": self.steps, "logged_loss": self.logged_loss, "supervised_tokens": supervised_tokens,
            "skipped": self.skipped, "train_seconds": self.seconds, "sources": sources, "rewards": rewards,
        }  # fmt: skip

    def restore(self, state: MeterState) -> None:
        """Go on from a checkpoint."""
        self.loss = torch.tensor(state["loss"], device=self.device)
        self.steps, self.logged_loss, self.skipped = state["steps"], state["logged_loss"], state["skipped"]
        self.supervised_tokens = state["supervised_tokens"] if is_main() else 0
        self.earlier_seconds = state["train_seconds"]
        if is_main() and (rewards := state.get("rewards")):
            self.rewards = torch.tensor(rewards, device=self.device)
        if self.sources is not None and (sources := state.get("sources")) is not None:
            self.sources.restore(sources)
