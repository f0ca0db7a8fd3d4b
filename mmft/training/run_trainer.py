"""RunTrainer: what mmft adds to the Trainer of any objective: evaluation, the loss of the whole run, rates by part."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerControl

from ..common.errors import UserError
from ..config.settings import Section
from ..evaluation.evaluate import Evaluator
from ..evaluation.preferences import PreferenceEvaluator
from ..losses.objectives import Objective
from ..system.distributed import share
from . import checkpoints, rates
from .meter import Meter
from .sampling import LengthGroupedSampler, MixtureSampler
from .source_meter import SourceMeter
from .token_batches import TokenBatchSampler

RowSampler = LengthGroupedSampler | MixtureSampler | TokenBatchSampler
if TYPE_CHECKING:  # what the methods find beside them: the Trainer of transformers, or one of TRL, which is built on it
    from transformers import Trainer as Beside
else:
    Beside = object


class RunTrainer(Beside):
    """The methods that the Trainer of every run has, for a class with a Trainer as its other base, whose `__init__` calls `set_up`.

    sampler: the order of the rows, None for a random one; of a TokenBatchSampler, `rows` are BatchedRows. rates: the config's section `trainer`,
    for rates by part (training/rates.py). preferences: measures a preference objective on held-out rows. generate: whether an evaluation also
    generates answers.
    """

    control: TrainerControl
    optimizer: Any

    def set_up(
        self, trainer: Section | None, evaluator: Evaluator | None, generate: bool, sampler: RowSampler | None = None, objective: Objective | None = None,
        preferences: PreferenceEvaluator | None = None, sources: SourceMeter | None = None,
    ) -> None:  # fmt: skip
        """Called after the Trainer's own `__init__`. objective: for preferences, None without."""
        self.sampler, self.rates, self.evaluator, self.generate = sampler, trainer or {}, evaluator, generate
        self.objective, self.preferences = objective, preferences
        self.meter = Meter(self.args.device, sources=sources)
        self.phase: Literal["step", "update", "measure"] = "step"  # what an out-of-memory error interrupted
        self.losses: list[torch.Tensor] = []  # of the micro-batches since the last optimizer step
        self.row_ids: list[str] = []  # of the same

    def keep(self, folder: Path) -> None:
        """Add what else this process needs to go on from here to a checkpoint that is being written."""

    def release(self) -> None:
        """Leave the model as it is without this Trainer, but for its weights."""

    def go_on(self, checkpoint: Path) -> None:
        """Take up what `keep` wrote."""

    @functools.cached_property
    def trained(self) -> list[torch.nn.Parameter]:
        """The trained parameters, collected once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's optimizer; with rates of their own for parts of the model in groups by part, or the one of LoRA-FA."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if self.rates.get("lora_fa"):
            self.optimizer = rates.lora_fa_optimizer(self.model, self.rates, self.args.weight_decay)
            return self.optimizer
        optimizer = super().create_optimizer(model)
        if rates.has_groups(self.rates):
            rates.regroup(optimizer, self.model if model is None else model, self.rates)
        return optimizer

    def samples_until(self, step: int) -> int:
        """Rows of the first `step` steps; where every batch has the same number, as if the last step of an epoch had no fewer."""
        if isinstance(self.sampler, TokenBatchSampler):
            return self.sampler.rows_until(step)
        return step * self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the loss of the meter, which a resumed run continues; the Trainer counts only from the resumed step."""
        if "loss" in logs:
            mean = self.meter.drain(self._over_processes(self.meter.loss))
            logs = {k: v for k, v in logs.items() if k != "loss"} if mean is None else {**logs, "loss": mean}
            if self.meter.sources is not None:
                logs |= self.meter.sources.drain()
            if self.objective is not None:
                logs |= self.meter.drain_rewards()
        if "learning_rate" in logs and rates.has_groups(self.rates):
            own = rates.rates_now(self.optimizer)  # the Trainer logs the rate of the first group; curves show that of the language model
            logs = {**logs, **own, "learning_rate": own.get("learning_rate/language", logs["learning_rate"])}
        if "train_loss" in logs:  # the last log
            logs = self._whole_run(logs)
            self._check_best_checkpoint()
        super().log(logs, start_time)

    def _over_processes(self, value: torch.Tensor) -> float:
        """The mean of a 0-d tensor over all processes."""
        return self.accelerator.gather(value).mean().item() if self.args.world_size > 1 else value.item()

    def _whole_run(self, logs: dict[str, float]) -> dict[str, float]:
        """The Trainer's last log, whose loss and speed are of this part of a resumed run, for the whole run."""
        steps = self.state.global_step
        if isinstance(self.sampler, TokenBatchSampler) and logs["train_runtime"]:  # the Trainer has counted batches
            rows = self.samples_until(steps) - self.samples_until(self.meter.first_step)
            logs["train_samples_per_second"] = round(rows / logs["train_runtime"], 3)
        logs["train_loss"] = (self.meter.logged_loss + self.meter.loss.item()) / max(steps, 0.001)
        seconds, here = logs["train_runtime"], steps - self.meter.first_step
        if self.meter.earlier_seconds and here and seconds:
            whole = seconds + self.meter.earlier_seconds
            for key in ("train_samples_per_second", "train_steps_per_second"):
                logs[key] = round(logs[key] * seconds * steps / here / whole, 3)
            logs["train_runtime"] = round(whole, 4)
        return logs

    def _check_best_checkpoint(self) -> None:
        """The Trainer loads the best checkpoint after its last log. Raises UserError if it is damaged."""
        best = self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and best and (wrong := checkpoints.problem(Path(best))):
            raise UserError(f"{best}: the best checkpoint is damaged ({wrong}); mmft resume goes on without it, from an earlier one")

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Loss per supervised token, and with `generate` the text metrics, on the held-out rows."""
        if self.evaluator is None:
            raise UserError("trainer.eval_strategy: there are no held-out rows to evaluate; set evaluation.split, or eval_strategy=no")
        self.phase = "measure"
        # every process measures all rows: weights spread over processes are gathered in step, and it takes no longer
        loss, values = self.evaluator.losses(self.model)
        if self.preferences is not None:
            values |= self.preferences.measure(self.model)
        if self.generate:
            values |= self.evaluator.measure(self.model)[0]
        measured = {f"{metric_key_prefix}_{key}": value for key, value in {"loss": loss, **values}.items()}
        metrics = share(lambda: measured)  # if a last digit differs, one process must not stop early while another goes on
        self.phase = "step"
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """The state dict of a model that FSDP or DeepSpeed spread over processes; None if this process holds the whole model."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            return None
        return self.accelerator.get_state_dict(self.model_wrapped)
