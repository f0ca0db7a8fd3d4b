"""Exponential moving average of the trained weights, which are what a run saves and measures at its end.

    E_n = d_n E_(n-1) + (1 - d_n) W_n,   d_n = min(decay, (1 + n) / (10 + n)),   E_0 = W_0

n: the steps so far. The smaller decay of the first steps keeps the beginning from weighing on a short training (as in TensorFlow's
ExponentialMovingAverage with num_updates).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..common.errors import UserError
from ..config.settings import Section, sharded_by

FILE = "ema.safetensors"  # in a checkpoint


def check_ema(trainer: Section) -> None:
    """Raises UserError for a decay that is none, and for settings that an average does not go with."""
    decay = trainer.get("ema_decay")
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 < decay < 1:
        raise UserError(f"trainer.ema_decay={decay}: must be a number between 0 and 1, e.g. 0.999, or null")
    if trainer.get("load_best_model_at_end"):
        raise UserError("trainer.ema_decay and trainer.load_best_model_at_end: the run would end with one or the other; drop one of them")
    if key := sharded_by(trainer):
        raise UserError(f"trainer.ema_decay: needs the trained weights whole on one device; drop trainer.{key}")


class Average(TrainerCallback):
    """Averages the parameters that require gradients. checkpoint: where a resumed run goes on, which has the average so far."""

    def __init__(self, model: torch.nn.Module, decay: float, checkpoint: Path | None):
        self.decay, self.checkpoint = decay, checkpoint
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.values: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.begin()

    def begin(self) -> None:
        """Start from the weights as they are, or from the checkpoint's average."""
        stored = {}
        if self.checkpoint is not None:
            if not (self.checkpoint / FILE).is_file():
                raise UserError(f"{self.checkpoint}: holds no {FILE}, so the average of the weights cannot go on; train the run again")
            stored = load_file(self.checkpoint / FILE)
        self.values = {name: (stored[name].to(p.device) if stored else p.detach().clone()) for name, p in self.trained.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        n = state.global_step
        update = get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)))
        update(list(self.values.values()), [p.detach() for p in self.trained.values()], n)

    def save(self, folder: Path) -> None:
        """Write the average into a staged checkpoint."""
        save_file({name: value.cpu().contiguous() for name, value in self.values.items()}, folder / FILE, metadata={"format": "pt"})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.use()

    def use(self) -> None:
        """Give the model the averaged weights."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(self.values[name])
