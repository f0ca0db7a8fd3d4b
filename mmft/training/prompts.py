"""PromptProcessor: stands for the model's processor in TRL's GRPOTrainer, so that prompts are rendered by mmft's collator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin

from ..collators.base import PER_TOKEN, Collator
from ..collators.types import Batch
from ..data.sample import Sample

ROW = "row"  # the column with the number of a row, which rewards read


def prompt_rows(rows: Sequence[Sample]) -> Dataset:
    """The data set of the trainer: a prompt holds the number of its row and a place for each image, and PromptProcessor renders the row."""
    prompts = [
        [{"role": "user", "content": [*({"type": "image", "image": str(n), "text": None} for n in range(len(rows[i].images))), {"type": "text", "text": str(i), "image": None}]}]
        for i in range(len(rows))
    ]  # fmt: skip
    return Dataset.from_dict({"prompt": prompts, ROW: list(range(len(rows)))})


class PromptProcessor(ProcessorMixin):
    """Renders prompts, which are numbers of rows, as the collator renders them for evaluation; decodes answers as it does.

    The trainer takes the prompts twice: as lists of ids to generate from, and padded for the log-probabilities. Both come from one batch.
    processor: the model's own, which is saved with a checkpoint.
    """

    def __init__(self, processor: Any, collator: Collator, rows: Sequence[Sample]):
        self.processor, self.collator, self.rows = processor, collator, rows
        self.tokenizer = processor.tokenizer
        self.last: tuple[list[int], Batch] | None = None

    def apply_chat_template(self, conversation: Any, tokenize: bool = False, **_: Any) -> Any:
        """The number of a row as text; with `tokenize` the prompts of several rows: ids in lists without padding, and the image tensors."""
        if not tokenize:
            return _number(conversation)
        batch = self.batch([int(_number(messages)) for messages in conversation])
        kept = batch["attention_mask"].bool()

        def lists(values: Any) -> list[list[int]]:
            return [row[mask].tolist() for row, mask in zip(values, kept, strict=True)]

        return {key: lists(value) if key in PER_TOKEN else value for key, value in batch.items()}

    def __call__(self, images: Any = None, text: Any = None, **_: Any) -> Batch:
        """The prompts of these rows, padded on the left. text: what `apply_chat_template` gave for each."""
        return dict(self.batch([int(number) for number in text]))

    def batch(self, numbers: list[int]) -> Batch:
        if self.last is None or self.last[0] != numbers:
            batch = self.collator.prompt([self.rows[n] for n in numbers])
            if "batch_num_images" in batch and all(int(n) == 1 for n in batch["batch_num_images"]):
                del batch["batch_num_images"]  # what LLaVA-OneVision supposes by itself; the trainer has no place for it
            self.last = numbers, batch
        return self.last[1]

    def image_processor(self, **options: Any) -> Any:
        """What the model's image processor returns for the images of the last prompts: the trainer asks it how many tiles each image has."""
        assert self.last is not None
        rows = [self.rows[n] for n in self.last[0]]
        return self.processor.image_processor(**{**options, "images": [self.collator.sized_images(row, row.load_images()) for row in rows]})

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return self.collator.decode([list(row) for row in ids])

    def save_pretrained(self, folder: Any, **_: Any) -> Any:
        return self.processor.save_pretrained(folder)


def _number(messages: Any) -> str:
    return str(next(part["text"] for part in messages[-1]["content"] if part["type"] == "text"))
