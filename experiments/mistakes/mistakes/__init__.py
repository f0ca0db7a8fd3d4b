"""Collators that make a known mistake on purpose, each a few lines over mmft's own. Named in conf/collator/, allowed by MMFT_PACKAGES=mistakes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mmft.collators.base import IGNORE
from mmft.collators.caption import CaptionCollator
from mmft.collators.chat import ChatCollator
from mmft.collators.types import Encoded


class BlindCaption(CaptionCollator):
    """BLIP-2 rows without image placeholders: the pixels are computed and go nowhere. The model's forward says nothing."""

    def encode(self, samples: Any, images: Any, generation: bool) -> Any:
        rows, tensors = super().encode(samples, images, generation)
        n = self.processor.num_query_tokens
        return [[replace(s, ids=s.ids[n:], labels=s.labels[n:]) for s in row] for row in rows], tensors

    def _check_images(self, *_: Any) -> None:
        """mmft's own check would refuse every row."""


class PromptLoss(ChatCollator):
    """`labels = input_ids.clone()`: loss on the prompt and on the image's placeholders as on the answer."""

    def encode(self, samples: Any, images: Any, generation: bool) -> Any:
        rows, tensors = super().encode(samples, images, generation)
        return [[replace(s, labels=list(s.ids)) for s in row] for row in rows], tensors


class _WrongEnd(ChatCollator):
    def encode(self, samples: Any, images: Any, generation: bool) -> Any:
        rows, tensors = super().encode(samples, images, generation)
        return [[self.spoil(s) for s in row] for row in rows], tensors

    def ends(self, row: Encoded) -> list[int]:
        return [i for i, label in enumerate(row.labels) if label == self.end_token_id]


class NoEnd(_WrongEnd):
    """The end token carries no loss, as where it is also the padding and padding is masked."""

    def spoil(self, row: Encoded) -> Encoded:
        ends = self.ends(row)
        return replace(row, labels=[IGNORE if i in ends else label for i, label in enumerate(row.labels)])


class PadEnd(_WrongEnd):
    """Answers are closed by the padding token, which the model's own settings do not know as an end."""

    def spoil(self, row: Encoded) -> Encoded:
        ends, pad = self.ends(row), self.tokenizer.pad_token_id
        ids, labels = ([pad if i in ends else value for i, value in enumerate(values)] for values in (row.ids, row.labels))
        return replace(row, ids=ids, labels=labels)
