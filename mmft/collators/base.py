"""What every collator shares: opening images, padding, labels, and the counts that must agree before a batch leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.errors import RowError

if TYPE_CHECKING:
    from ..data.sample import Sample

IGNORE = -100  # torch.nn.CrossEntropyLoss's ignore_index: a label that carries no loss
PIXELS = ("pixel_values", "pixel_attention_mask", "pixel_mask")  # what a vision part reads, and no other part does
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass
class Encoded:
    """One row as token ids. `labels` equals `ids` where the token carries loss and IGNORE elsewhere; same length."""

    ids: list[int]
    labels: list[int]
    extra: dict[str, list[int]]  # further per-token values, e.g. mm_token_type_ids


class Collator:
    """Base of the collators. Subclasses turn samples into `Encoded` rows and image tensors.

    Built with the live objects (processor, family, loaded model's config, end token ids) and the keys of its config
    group. `__call__` gives the training batch, `prompt` the batch to generate from; both see the same images.
    """

    def __init__(self, *, processor: Any, family: Any, model_config: Any, end_token_ids: list[int], max_length: int | None = None):
        self.processor, self.family, self.model_config = processor, family, model_config
        self.tokenizer = processor.tokenizer
        self.end_token_ids = end_token_ids
        self.max_length = max_length

    # --- to be given by a subclass ------------------------------------------------------------------------------

    def encode(self, samples: Sequence[Sample], images: list[list[Any]], generation: bool) -> tuple[list[Encoded], dict[str, Any]]:
        """Rows and image tensors of samples; with `generation` the rows stop where the model's answer begins."""
        raise NotImplementedError

    # --- what callers use ---------------------------------------------------------------------------------------

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The training batch: input_ids, attention_mask, labels (B, S) padded right, and the image tensors.

        Errors raised: RowError for a row whose placeholders and features differ, that is too long, or carries no loss.
        """
        return self._batch(samples, generation=False)

    def prompt(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch to generate from: the same rows up to the answer, padded left, without labels."""
        return self._batch(samples, generation=True)

    def decode(self, ids: Any) -> list[str]:
        """Generated ids (B, T) as texts, special tokens removed."""
        return [t.strip() for t in self.tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)]

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends a generated text: the one trained on and those of the model's own settings."""
        return list(dict.fromkeys([self.end_token_id, *self.end_token_ids]))

    end_token_id: int  # the end token that carries loss; set by the subclass

    # --- assembling ---------------------------------------------------------------------------------------------

    def _batch(self, samples: Sequence[Sample], generation: bool) -> dict[str, Any]:
        return self.assemble(samples, *self.encode_checked(samples, generation), generation)

    def encode_checked(self, samples: Sequence[Sample], generation: bool) -> tuple[list[Encoded], dict[str, Any]]:
        """Rows and image tensors of samples, each row proved to fit its images. Errors raised: RowError."""
        for sample in samples:
            places = sum(part["type"] == "image" for message in sample.messages for part in message["content"])
            if places != len(sample.images):
                raise RowError(sample.id, f"{len(sample.images)} images but {places} image places in its messages")
        images = [sample.load_images() for sample in samples]
        rows, tensors = self.encode(samples, images, generation)
        for sample, row in zip(samples, rows, strict=True):
            if self.max_length is not None and len(row.ids) > self.max_length:
                raise RowError(
                    sample.id,
                    f"{len(row.ids)} tokens, more than collator.max_length={self.max_length}; rows are never cut (an image could be cut"
                    " through): raise the limit, or make images smaller with model.processor.max_pixels",
                )
            if not generation and all(label == IGNORE for label in row.labels[1:]):
                raise RowError(sample.id, "no token of this row carries loss; its answer is empty")
        self._check_images(samples, rows, images, tensors)
        return rows, tensors

    def assemble(self, samples: Sequence[Sample], rows: list[Encoded], tensors: dict[str, Any], generation: bool) -> dict[str, Any]:
        """The batch of encoded rows and of what stands for their images: image tensors, or features computed before."""
        batch = self._pad(rows, left=generation)
        if generation:
            del batch["labels"]
        else:
            batch["row_ids"] = [sample.id for sample in samples]  # to name the rows of a bad step
        batch.update(tensors)
        return batch

    def _check_images(self, samples: Sequence[Sample], rows: list[Encoded], images: list[list[Any]], tensors: dict[str, Any]) -> None:
        """Every row must hold exactly as many image tokens as its own images have features.

        Totals alone are not enough: two wrong rows can cancel, and then the features of one leak into the other.
        """
        features = self.family.features_per_image(tensors, self.model_config)
        if features is None:
            return
        token = self.image_token_id
        taken = 0
        for sample, row, own in zip(samples, rows, images, strict=True):
            wanted = sum(features[taken : taken + len(own)])
            taken += len(own)
            found = row.ids.count(token)
            if found != wanted:
                raise RowError(sample.id, f"{found} image tokens in the text but {wanted} image features for its {len(own)} images")
        if taken != len(features):
            raise RowError(samples[-1].id, f"{len(features)} images were processed for {taken} images in this batch")

    @property
    def image_token_id(self) -> int:
        config = self.model_config
        return config.image_token_id if getattr(config, "image_token_id", None) is not None else config.image_token_index

    def _pad(self, rows: list[Encoded], left: bool) -> dict[str, Any]:
        import numpy as np
        import torch

        length = max(len(row.ids) for row in rows)

        def padded(values: list[Any], fill: int) -> Any:
            out = np.full((len(values), length), fill, dtype=np.int64)
            for line, own in zip(out, values):
                line[length - len(own) if left else 0 : length if left else len(own)] = own
            return torch.from_numpy(out)

        batch = {
            "input_ids": padded([r.ids for r in rows], self.tokenizer.pad_token_id),
            "attention_mask": padded([np.ones(len(r.ids), np.int64) for r in rows], 0),
            "labels": padded([r.labels for r in rows], IGNORE),
        }
        return batch | {key: padded([r.extra[key] for r in rows], 0) for key in rows[0].extra}
