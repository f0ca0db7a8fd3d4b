"""Collator: the base class. It opens images, checks encoded rows against them, and pads rows to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError
from .types import Batch, Encoded, FamilyRules

if TYPE_CHECKING:
    import torch

    from ..data.sample import Sample
    from .types import Images, Tensors

IGNORE = -100  # ignore_index of torch.nn.CrossEntropyLoss: the label of a token that carries no loss
PIXELS = ("pixel_values", "pixel_attention_mask", "pixel_mask")  # inputs that only the vision tower reads
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")  # processor outputs with one value per token


class Collator:
    """Base class of the collators. A subclass implements `encode` and sets `end_token_id`.

    `__call__` returns the training batch, `prompt` the batch to generate from; both open and preprocess images in the same way.

    processor: transformers' processor. family: rules of the model family. model_config: config of the loaded model.
    end_token_ids: ids that end a text, from the loaded model's generation config. max_length: tokens; a longer row is
    refused, never cut (null: no limit).
    """

    end_token_id: int  # the end token that is trained

    def __init__(
        self, *, processor: Any, family: FamilyRules, model_config: Any, end_token_ids: list[int], max_length: int | None = None
    ) -> None:
        self.processor, self.family, self.model_config = processor, family, model_config
        self.tokenizer = processor.tokenizer
        self.end_token_ids = end_token_ids
        self.max_length = max_length

    # --- for subclasses -----------------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], images: list[Images], generation: bool) -> tuple[list[Encoded], Tensors]:
        """Encode samples and preprocess their images; with `generation`, each row ends where the model's answer begins."""
        raise NotImplementedError

    # --- for callers --------------------------------------------------------------------------------------------

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The training batch: input_ids, attention_mask and labels (B, S), padded on the right, row_ids, and the image tensors.

        Raises RowError for a row that is too long, has no token with loss, or whose image tokens do not match its images.
        """
        return self._batch(samples, generation=False)

    def prompt(self, samples: Sequence[Sample]) -> Batch:
        """The batch to generate from: the same rows up to the answer, padded on the left, without labels. Raises RowError."""
        return self._batch(samples, generation=True)

    def decode(self, ids: torch.Tensor | list[list[int]]) -> list[str]:
        """Generated ids (B, T) as texts, without special tokens and surrounding white space."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)]

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a generated text: the trained one, then those of the model's generation config."""
        return list(dict.fromkeys([self.end_token_id, *self.end_token_ids]))

    @property
    def image_token_id(self) -> int:
        """The id of the token that image features replace."""
        config = self.model_config
        return config.image_token_id if getattr(config, "image_token_id", None) is not None else config.image_token_index

    # --- the two halves of a batch; the feature cache calls them one by one ---------------------------------------

    def encode_checked(self, samples: Sequence[Sample], generation: bool) -> tuple[list[Encoded], Tensors]:
        """Encode samples and check each row: images, length, loss. Raises RowError."""
        for sample in samples:
            placeholders = sum(part["type"] == "image" for message in sample.messages for part in message["content"])
            if placeholders != len(sample.images):
                raise RowError(sample.id, f"{len(sample.images)} images but {placeholders} image places in its messages")
        images = [sample.load_images() for sample in samples]
        rows, tensors = self.encode(samples, images, generation)
        for sample, row in zip(samples, rows, strict=True):
            if self.max_length is not None and len(row.ids) > self.max_length:
                raise RowError(
                    sample.id,
                    f"{len(row.ids)} tokens, more than collator.max_length={self.max_length}; rows are never cut (an image could be cut"
                    " through): raise the limit, or make images smaller with model.processor.max_pixels",
                )
            # the first label is never predicted: no token comes before it
            if not generation and all(label == IGNORE for label in row.labels[1:]):
                raise RowError(sample.id, "no token of this row carries loss; its answer is empty")
        self._check_images(samples, rows, images, tensors)
        return rows, tensors

    def assemble(self, samples: Sequence[Sample], rows: list[Encoded], tensors: Tensors, generation: bool) -> Batch:
        """The batch of encoded rows and their image inputs: image tensors, or features computed before."""
        batch = self._pad(rows, left=generation)
        if generation:
            del batch["labels"]
        else:
            batch["row_ids"] = [sample.id for sample in samples]  # lets an error message name the rows of a step
        batch.update(tensors)
        return batch

    # --- internal -----------------------------------------------------------------------------------------------

    def _batch(self, samples: Sequence[Sample], generation: bool) -> Batch:
        return self.assemble(samples, *self.encode_checked(samples, generation), generation)

    def _check_images(self, samples: Sequence[Sample], rows: list[Encoded], images: list[Images], tensors: Tensors) -> None:
        """Each row must hold as many image tokens as its own images have features. Raises RowError.

        The batch total is not enough: two wrong rows can cancel out, and then one row reads the other's features.
        """
        features = self.family.features_per_image(tensors, self.model_config)
        if features is None:
            return
        image_token = self.image_token_id
        start = 0
        for sample, row, row_images in zip(samples, rows, images, strict=True):
            expected = sum(features[start : start + len(row_images)])
            start += len(row_images)
            count = row.ids.count(image_token)
            if count != expected:
                raise RowError(
                    sample.id, f"{count} image tokens in the text but {expected} image features for its {len(row_images)} images"
                )
        if start != len(features):
            raise RowError(samples[-1].id, f"{len(features)} images were processed for {start} images in this batch")

    def _pad(self, rows: list[Encoded], left: bool) -> Batch:
        import numpy as np
        import torch

        length = max(len(row.ids) for row in rows)

        def padded(sequences: Sequence[Sequence[int]], fill: int) -> torch.Tensor:
            array = np.full((len(sequences), length), fill, dtype=np.int64)
            for line, values in zip(array, sequences):
                line[length - len(values) if left else 0 : length if left else len(values)] = values
            return torch.from_numpy(array)

        batch = {
            "input_ids": padded([r.ids for r in rows], self.tokenizer.pad_token_id),
            "attention_mask": padded([[1] * len(r.ids) for r in rows], 0),
            "labels": padded([r.labels for r in rows], IGNORE),
        }
        return batch | {key: padded([r.extra[key] for r in rows], 0) for key in rows[0].extra}
