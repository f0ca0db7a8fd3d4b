"""Measure a model on held-out rows: loss over supervised tokens, generated or chosen answers, metrics."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..collators.types import Batch, BatchMaker
from ..common.errors import UserError
from ..common.model_parts import is_encoder_decoder
from ..common.records import AnswerRecord, MetricValues
from ..common.tensors import eval_mode, to_device
from ..data.sample import Sample
from ..data.selection import parts_of
from ..losses.supervised import sequence_losses
from ..system.console import shows_progress
from .choose import Chooser, chosen
from .generate import Answer, Outcome, RowGenerator
from .metrics.base import MetricSet
from .metrics.defaults import default_metrics
from .token_limit import TokenLimit, token_limit

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

log = logging.getLogger("mmft")
CHOSEN_TOGETHER = 16  # times batch_size: rows among which those of one length are computed together


def mean_loss(losses: Sequence[tuple[float, int]]) -> float:
    """Mean loss per supervised token of rows: (sum of its loss, its number of tokens) each; every token has the same weight."""
    return sum(loss for loss, _ in losses) / max(sum(tokens for _, tokens in losses), 1)


@dataclass
class Evaluator:
    """Measures models on the same held-out rows: base and tuned model, during and after training.

    generation: keys of transformers' GenerationConfig; max_new_tokens=auto is replaced by the limit that the rows' references
    need (`limit`). batch_size: rows in one batch when generating; loss_batch_size: when computing the loss. progress: show a progress
    bar on a terminal. announce: log why our decoding loop cannot generate the answers, if it cannot. chooser: chooses answers instead of
    generating them (evaluation.answer=choose).
    """

    rows: Sequence[Sample]
    collator: BatchMaker
    generation: Mapping[str, Any]
    batch_size: int = 16
    loss_batch_size: int = 16
    progress: bool = True
    metrics: MetricSet = field(default_factory=default_metrics)
    chooser: Chooser | None = None
    announce: bool = True
    limit: TokenLimit = field(init=False)

    def __post_init__(self) -> None:
        self.limit = token_limit(self.generation, map(self.collator.written, self.rows), self.collator.tokenizer)
        self.generation = {**self.generation, "max_new_tokens": self.limit.max_new_tokens}

    def loss(self, model: torch.nn.Module) -> float:
        """Mean loss per supervised token over all rows; every token has the same weight, whatever its row or batch."""
        return mean_loss(self.row_losses(model))

    def losses(self, model: torch.nn.Module) -> tuple[float, MetricValues]:
        """(`loss`, of a mix also the loss of each source as `loss/SOURCE`)."""
        losses = self.row_losses(model)
        return mean_loss(losses), self.losses_of_sources(losses)

    def losses_of_sources(self, losses: Sequence[tuple[float, int]]) -> MetricValues:
        """`loss/SOURCE` of each source of a mix; {} without one. losses: of every row."""
        own, start = MetricValues(), 0
        for source, rows in parts_of(self.rows).items():
            own |= {f"loss/{source}": mean_loss(losses[start : start + len(rows)])} if source else {}
            start += len(rows)
        return own

    def row_losses(self, model: torch.nn.Module) -> list[tuple[float, int]]:
        """(sum of the loss over its supervised tokens, their number) of each row; a row of several sequences has those of all of them."""
        import torch

        losses: list[tuple[float, int]] = []
        with torch.no_grad(), eval_mode(model):
            for samples in self._batches(self.rows, self.loss_batch_size, "loss"):
                batch = to_device(self.collator(samples), model.device)
                own = {sample.id: [0.0, 0] for sample in samples}
                for row, (loss, tokens) in zip(batch["row_ids"], sequence_losses(model, batch), strict=True):
                    own[row][0] += loss
                    own[row][1] += tokens
                losses += [(own[sample.id][0], int(own[sample.id][1])) for sample in samples]
        return losses

    def generate(self, model: torch.nn.Module, rows: Sequence[Sample] | None = None) -> list[Answer]:
        """The model's answers to the prompts of `rows` (default: all held-out rows), one for each row. Raises UserError."""
        rows = self.rows if rows is None else rows
        answers: dict[int, Answer] = {}
        for index, answer in self.answers(model, rows):
            if isinstance(answer, UserError):
                raise answer
            answers[index] = answer
        return [answers[i] for i in range(len(rows))]

    def answers(self, model: Any, rows: Sequence[Sample]) -> Iterator[Outcome]:
        """(index, answer) of every row, in the order in which the answers end, or (index, why the row cannot be read). Raises UserError."""
        from tqdm import tqdm

        if self.chooser is not None:
            yield from self._chosen(self.chooser, model, rows)
            return
        generator = RowGenerator(self.collator, self.generation_config(), max(1, self.batch_size), self.answer)
        with eval_mode(model), tqdm(total=len(rows), desc="answers", unit=" rows", leave=False, disable=not (self.progress and len(rows) > 1 and shows_progress())) as bar:
            for outcome in generator.answers(model, rows):
                if generator.reason and self.announce:
                    log.info("%-14s batches of %d in transformers' own loop: %s", "answers", self.batch_size, generator.reason)
                    self.announce = False
                yield outcome
                bar.update()

    def _chosen(self, chooser: Chooser, model: Any, rows: Sequence[Sample]) -> Iterator[Outcome]:
        """`answers` by the likelihood of each choice. Rows are tried one by one only if they fail together."""
        size = CHOSEN_TOGETHER * max(1, self.batch_size)
        for start in range(0, len(rows), size):
            part = [rows[i] for i in range(start, min(start + size, len(rows)))]
            try:
                found: list[dict[str, float] | UserError] = [*chooser.probabilities(model, self.collator, part, self.progress)]
            except UserError:
                found = [self._chosen_alone(chooser, model, row) for row in part]
            yield from ((start + i, f if isinstance(f, UserError) else Answer(chosen(f), probabilities=f)) for i, f in enumerate(found))

    def _chosen_alone(self, chooser: Chooser, model: Any, row: Sample) -> dict[str, float] | UserError:
        try:
            return chooser.probabilities(model, self.collator, [row])[0]
        except UserError as error:
            return error

    def answer(self, model: Any, inputs: Batch, **options: Any) -> list[Answer]:
        """The answers to one prompt batch; options: further arguments of the model's `generate`. Raises UserError."""
        import torch

        from .decode import generate

        settings = self.generation_config()
        with eval_mode(model):
            ids = generate(model, inputs, settings, **options)
        # an encoder-decoder model returns the decoder's start token in place of the prompt
        prompt_length = 1 if is_encoder_decoder(model.config) else inputs["input_ids"].shape[1]
        ids = ids[:, prompt_length:]
        limit = settings.max_new_tokens if settings.max_new_tokens is not None else (settings.max_length or 0) - prompt_length
        ended = torch.isin(ids, torch.tensor(self.collator.end_ids, device=ids.device)).any(dim=1).tolist()
        return [Answer(text, ids.shape[1] >= limit and not end) for text, end in zip(self.collator.decode(ids), ended, strict=True)]

    def generation_config(self) -> GenerationConfig:
        """The settings as GenerationConfig, with the collator's end tokens. Raises UserError."""
        from transformers import GenerationConfig

        for key, only in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
            if self.generation.get(key) not in (None, only):
                raise UserError(f"generation.{key}={self.generation[key]}: one text is kept for each prompt; drop this key")
        try:
            return GenerationConfig(
                **self.generation, eos_token_id=self.collator.end_ids, pad_token_id=self.collator.tokenizer.pad_token_id, use_cache=True
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"generation: {str(error).strip().splitlines()[0]}") from None

    def check_generation(self) -> None:
        """Raises UserError for settings that transformers would refuse to save with the trained weights."""
        try:
            self.generation_config().validate(strict=True)
        except ValueError as error:
            lines = [line.strip(" -") for line in str(error).strip().splitlines()]
            raise UserError(f"generation: {lines[1] if lines[0].startswith('GenerationConfig is invalid') and len(lines) > 1 else lines[0]}") from None

    def measure(self, model: torch.nn.Module) -> tuple[MetricValues, list[AnswerRecord]]:
        """(metrics over all rows, one record for each row) of generated answers. Raises UserError."""
        answers = self.generate(model)
        records = [self.record(i, sample, answer) for i, (sample, answer) in enumerate(zip(self.rows, answers, strict=True))]
        return self.metrics.with_sources(records), records

    def record(self, index: int, sample: Sample, answer: Answer) -> AnswerRecord:
        """One row of eval/*.jsonl, with its metrics."""
        record = answer_record(self.collator, index, sample, answer)
        return {**record, "metrics": self.metrics.row(record)}

    def _batches(self, rows: Sequence[Sample], size: int, what: str) -> Iterator[list[Sample]]:
        from tqdm import tqdm

        starts = range(0, len(rows), size)
        for start in tqdm(starts, desc=what, leave=False, disable=not (self.progress and len(starts) > 1 and shows_progress())):
            yield [rows[i] for i in range(start, min(start + size, len(rows)))]


def answer_record(collator: BatchMaker, index: int, sample: Sample, answer: Answer) -> AnswerRecord:
    """A row with the model's answer as metrics read it. Reasoning is kept apart: the metrics compare the answers."""
    reasoning, text = collator.split_answer(answer.text, generated=True) if answer.probabilities is None else ("", answer.text)
    written = collator.written(sample)
    references = [collator.split_answer(reference)[1] for reference in written.references]
    record: AnswerRecord = {
        "index": index, "id": sample.id, "root": sample.root, "images": list(sample.images), "prompt": written.prompt_text,
        "references": references, "prediction": text, "truncated": answer.truncated,
    }  # fmt: skip
    if reasoning:
        record["reasoning"] = reasoning
    if sample.source:
        record["source"] = sample.source
    if sample.regions:
        record |= {"boxes": collator.regions_in(text, sample), "reference_boxes": sample.regions}
    if answer.probabilities is not None:
        record["probabilities"] = answer.probabilities
    return record
