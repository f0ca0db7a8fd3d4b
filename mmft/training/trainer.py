"""SupervisedTrainer: Hugging Face's Trainer with mmft's loss, evaluation and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..collators.answers import KIND
from ..collators.types import BatchMaker
from ..common.tensors import to_device
from ..config.settings import Section
from ..data.augment import Augmented
from ..evaluation.evaluate import Evaluator
from ..evaluation.preferences import PreferenceEvaluator
from ..losses.answers import AnswerParts, ObjectiveLoss, mismatched_log_ratios, objective_loss, take_answers
from ..losses.objectives import Objective
from ..losses.packing import Packing
from ..losses.supervised import RowGroups, grouped_loss, supervised_logits
from ..rewrites.apply import Rewrites
from .accumulation import micro_batches, packed_positions
from .run_trainer import RowSampler, RunTrainer
from .sampling import set_sampler
from .source_meter import SourceMeter
from .token_batches import BatchedRows, BatchOfRows, TokenBatchSampler


class BatchLoss(NamedTuple):
    """loss: sum over the supervised tokens, divided by the number of those of the step (`items`; None: of the batch). count: supervised tokens
    of the batch. total: the undivided sum. by_group: see losses.supervised.group_sums. objective: of a preference objective, whose sums are
    over pairs or answers in place of tokens.
    """

    loss: torch.Tensor
    count: torch.Tensor
    total: torch.Tensor
    by_group: torch.Tensor | None
    objective: ObjectiveLoss | None = None

    @classmethod
    def of(cls, found: ObjectiveLoss, items: torch.Tensor | int | None) -> BatchLoss:
        """Of a preference objective. items: pairs or answers of the step; None: of the batch."""
        return cls(found.total / (found.units if items is None else items), found.tokens, found.total, found.by_group, found)


class JointMember(Protocol):
    """The place of one run in a group of runs that are trained jointly (mmft/joint/)."""

    @property
    def size(self) -> int:
        """The number of runs that are trained jointly."""
        ...

    def step(self, trainer: SupervisedTrainer, inputs: dict[str, Any], items: torch.Tensor | int | None, groups: RowGroups | None, answers: AnswerParts | None) -> BatchLoss:
        """The loss of a micro-batch, after its gradients were added to the parameters. items: see BatchLoss. groups: of its sequences. answers:
        what an AnswerCollator added to it.
        """
        ...

    def log_step(self, step: int, steps: int, loss: str, time_left: str) -> None:
        """Show the losses of all members on one line."""
        ...


class SupervisedTrainer(RunTrainer, Trainer):
    """Trainer whose loss is the mean over the supervised tokens of the whole (accumulated, distributed) batch.

    sampler: the order of the rows, None for a random one; of a TokenBatchSampler, `rows` are BatchedRows. sources: of a mix. merged_rows: rows of
    each micro-batch that was merged into one batch (training/accumulation.py), or None. packing: lays the rows of a batch end to end. member: the
    place in a group of jointly trained runs, or None. objective: for preferences, with a collator that is an AnswerCollator; None: the cross
    entropy. preferences: measures them on held-out rows. trainer: the config's section, for rates by part (training/rates.py).
    """

    def __init__(
        self, *, model: Any, args: TrainingArguments, rows: Sequence[Any], held_out: Sequence[Any] | None, collator: BatchMaker | BatchOfRows, processor: Any,
        callbacks: list[TrainerCallback], rewrites: Rewrites, sampler: RowSampler | None = None, sources: Sequence[str] = (), evaluator: Evaluator | None = None, generate: bool = False,
        member: JointMember | None = None, merged_rows: int | None = None, packing: Packing | None = None, objective: Objective | None = None, preferences: PreferenceEvaluator | None = None,
        trainer: Section | None = None,
    ):  # fmt: skip
        super().__init__(
            model=model, args=args, train_dataset=rows, eval_dataset=held_out, data_collator=collator, processing_class=processor, callbacks=callbacks
        )
        unit = "tokens" if objective is None else "pairs" if objective.PAIRS else "answers"
        self.set_up(trainer, evaluator, generate, sampler, objective, preferences, SourceMeter(sources, args.device, unit) if sources else None)
        self.rewrites, self.member, self.merged_rows = rewrites, member, merged_rows
        self.packing = packing
        self.model_accepts_loss_kwargs = True  # have the Trainer count supervised tokens over the accumulated batch
        self.loss_is_scaled_for_ga = True  # compute_loss already divides by that count
        self._base_parameters: int | None = None

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if self.sampler is not None:
            set_sampler(loader, self.sampler)
        rows = self.train_dataset.rows if isinstance(self.train_dataset, BatchedRows) else self.train_dataset
        if isinstance(rows, Augmented):
            rows.follow(loader)
        return loader

    def num_examples(self, dataloader: Any) -> int:
        """Rows of an epoch, from which the Trainer computes its speed."""
        if isinstance(self.sampler, TokenBatchSampler):
            return self.sampler.rows_per_epoch
        return len(self.sampler) if self.sampler is not None else super().num_examples(dataloader)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        if self.rewrites.dropout is not None:
            merged = micro_batches(inputs["attention_mask"], self.merged_rows) if self.merged_rows else []
            packed = None
            if self.packing is not None:
                mask = inputs["attention_mask"]
                merged = merged or [(mask.shape[0], mask.shape[1])]
                packed = packed_positions(mask, merged)
            self.rewrites.dropout.advance(self.state.global_step, len(self.losses), merged, packed)
        if self.member is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self._joint_step(model, inputs, num_items_in_batch, self.member)
        self.meter.loss += loss
        return loss

    def _joint_step(self, model: Any, inputs: dict[str, Any], items: torch.Tensor | int | None, member: JointMember) -> torch.Tensor:
        """`training_step` with one forward and backward pass for all members of a group."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # schedule-free optimizers
            self.optimizer.train()
        inputs = to_device(inputs, self.args.device)
        groups, answers = self._count_rows(inputs), take_answers(inputs)
        batch = member.step(self, inputs, items, groups, answers)
        self._count_losses(batch, groups, answers)
        return batch.loss

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of a step, and the divisor of their losses: supervised tokens, or for preferences pairs or answers."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.objective is None or not batches:
            return batches, items
        units = sum(self.objective.units(batch[KIND]).sum() for batch in batches).to(device)
        whole = self.args.world_size > 1 and self.args.average_tokens_across_devices
        return batches, self.accelerator.gather(units).sum() if whole else units

    def _count_rows(self, inputs: dict[str, Any]) -> RowGroups | None:
        """Take the ids of the rows out of a batch; returns the sources of a mix that they come from."""
        row_ids = inputs.pop("row_ids", [])
        self.row_ids += row_ids
        return self.meter.sources.groups(row_ids) if self.meter.sources is not None else None

    def _count_losses(self, batch: BatchLoss, groups: RowGroups | None, answers: AnswerParts | None = None) -> None:
        self.meter.supervised_tokens += batch.count.detach()
        self.losses.append(batch.loss.detach())
        found, count, tokens = batch.objective, batch.count, None
        if found is not None and answers is not None and self.objective is not None:
            self.meter.rewards += found.rewards.to(self.meter.device)
            count, tokens = found.units, found.group_tokens
            groups = groups and RowGroups(groups.index[self.objective.units(answers.kind).cpu()], groups.count)
        if self.meter.sources is not None and groups is not None and batch.by_group is not None:
            self.meter.sources.add(batch.by_group, batch.total.detach(), count, groups, tokens)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        groups, answers = self._count_rows(inputs), take_answers(inputs)
        if answers is not None and self.objective is not None:
            mismatched = mismatched_log_ratios(model, answers)
            batch = BatchLoss.of(objective_loss(self.objective, answers, *supervised_logits(model, inputs), mismatched, groups), num_items_in_batch)
        else:
            whole, count, by_group = grouped_loss(model, inputs, self.args.label_smoothing_factor, groups, self.packing)
            batch = BatchLoss(whole / (count if num_items_in_batch is None else num_items_in_batch), count, whole, by_group)
        loss = batch.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the gradient is averaged over processes afterwards
        self._count_losses(batch._replace(loss=loss), groups, answers)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """transformers' own estimate, 6 x parameters x tokens, with the parameters counted once and not at every step."""
        if self._base_parameters is None:
            self._base_parameters = self.model.num_parameters(exclude_embeddings=True)
        tokens = inputs["input_ids"].numel() if self.packing is None else int(inputs["attention_mask"].sum())
        return 6 * self._base_parameters * tokens

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss as its gradient is taken: fp16 gradients need a scale."""
        return loss if self.accelerator.scaler is None else self.accelerator.scaler.scale(loss)
