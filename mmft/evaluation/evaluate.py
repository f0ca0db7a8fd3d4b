"""Measure a model on held-out rows: loss over supervised tokens, generated answers, text metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..collators.base import Collator
from ..common.errors import UserError
from ..common.tensors import eval_mode, to_device
from ..losses.supervised import supervised_loss


@dataclass
class Evaluator:
    """The held-out rows and how they are measured; the same for base and tuned model, during and after training.

    rows: a sequence of samples. generation: GenerationConfig's keys. batch_size: rows at once when generating,
    loss_batch_size when computing the loss.
    """

    rows: Sequence[Any]
    collator: Collator
    generation: dict[str, Any]
    batch_size: int = 16
    loss_batch_size: int = 16
    progress: bool = True

    def loss(self, model: Any) -> float:
        """Mean loss of a supervised token over all rows (each token counts once, whatever its row or batch)."""
        import torch

        total, count = 0.0, 0
        with torch.no_grad(), eval_mode(model):
            for batch in self._batches(self.rows, self.loss_batch_size, "loss"):
                loss, n = supervised_loss(model, to_device(self.collator(batch), model.device))
                total, count = total + loss.item(), count + int(n)
        return total / max(count, 1)

    def generate(self, model: Any, rows: Sequence[Any] | None = None) -> list[str]:
        """The model's own answers to the rows' prompts, one text a row."""
        texts: list[str] = []
        for batch in self._batches(self.rows if rows is None else rows, self.batch_size, "answers"):
            texts += self.answer(model, self.collator.prompt(batch))
        return texts

    def answer(self, model: Any, inputs: dict[str, Any], **more: Any) -> list[str]:
        """The generated texts of one prompt batch; `more` are further arguments of `generate`. Errors raised: UserError."""
        import torch

        settings = self.generation_config()
        inputs = to_device(inputs, model.device)
        with torch.no_grad(), eval_mode(model):
            try:
                ids = model.generate(**inputs, generation_config=settings, **more)
            except ValueError as error:  # what transformers finds wrong with the settings
                raise UserError(f"generation: {str(error).strip().splitlines()[0]}") from None
        return self.collator.decode(ids[:, inputs["input_ids"].shape[1] :])

    def generation_config(self) -> Any:
        """GenerationConfig of the settings, ended by the collator's end tokens. Errors raised: UserError."""
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

    def measure(self, model: Any) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """(metrics over all rows, one record a row) of generated answers."""
        from . import metrics

        texts = self.generate(model)
        references = [list(sample.references) for sample in self.rows]
        return metrics.compute(texts, references), [self.record(i, s, t) for i, (s, t) in enumerate(zip(self.rows, texts, strict=True))]

    def record(self, index: int, sample: Any, text: str) -> dict[str, Any]:
        """One row of eval/*.jsonl."""
        from . import metrics

        return {
            "index": index, "id": sample.id, "root": sample.root, "images": list(sample.images), "prompt": sample.prompt_text,
            "references": list(sample.references), "prediction": text, "metrics": metrics.per_sample(text, list(sample.references)),
        }

    def _batches(self, rows: Sequence[Any], size: int, what: str) -> Any:
        from tqdm import tqdm

        starts = range(0, len(rows), size)
        for start in tqdm(starts, desc=what, leave=False, disable=None if self.progress and len(starts) > 1 else True):
            yield [rows[i] for i in range(start, min(start + size, len(rows)))]


class Subset(Sequence[Any]):
    """The first `n` rows of a split (null: all), without reading them."""

    def __init__(self, rows: Sequence[Any], n: int | None):
        self.rows, self.n = rows, len(rows) if n is None else min(n, len(rows))

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: Any) -> Any:
        if not -self.n <= index < self.n:
            raise IndexError(index)
        return self.rows[index % self.n]
