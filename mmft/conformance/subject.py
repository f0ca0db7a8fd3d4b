"""What the conformance checks look at: a loaded model, its collator, and a few rows."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..collators.types import Batch, BatchMaker
from ..common.tensors import eval_mode, to_device
from ..data.sample import Sample, assistant_turn, user_turn
from ..losses.supervised import supervised_logits
from ..models.families.base import Family

if TYPE_CHECKING:
    import torch

SIZES = ((64, 64), (96, 64), (64, 96))  # width and height of the three images, in pixels
QUESTIONS = ("What is this?", "Which colours do you see?")
MASKED = -1e30  # logits of tokens that a model never writes (Chameleon: image tokens)
ANSWERS = ("a red square", "two dogs and a blue circle")


@dataclass
class Subject:
    """model: the base, in eval mode; no check changes it. folder: holds the three images. adapter: keys of `lora` for the checks that attach one
    (method, options), beside those that the checks need.
    """

    model: Any
    collator: BatchMaker
    family: Family
    folder: Path
    adapter: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, model: Any, collator: BatchMaker, family: Family, folder: Path, adapter: dict[str, Any] | None = None) -> Subject:
        """A subject whose images are written to `folder`: noise, the same on every machine."""
        from PIL import Image

        folder.mkdir(parents=True, exist_ok=True)
        for i, (width, height) in enumerate(SIZES):
            Image.frombytes("RGB", (width, height), random.Random(i).randbytes(3 * width * height)).save(folder / f"{i}.png")
        return cls(model.eval(), collator, family, folder, adapter or {})

    def row(self, name: str, images: tuple[int, ...], question: str, answer: str) -> Sample:
        """A row with some of the three images, all before the question."""
        turns = [user_turn(len(images), question), assistant_turn(answer)]
        return Sample(name, tuple(f"{i}.png" for i in images), turns, (answer,), str(self.folder))

    def rows(self) -> list[Sample]:
        """Two rows with one image each, of different lengths."""
        return [self.row("first", (0,), QUESTIONS[0], ANSWERS[0]), self.row("second", (1,), QUESTIONS[1], ANSWERS[1])]

    def batch(self, rows: list[Sample]) -> Batch:
        return to_device(self.collator(rows), self.model.device)

    def logits(self, rows: list[Sample], model: Any = None) -> torch.Tensor:
        """Logits (n, V) of the supervised tokens of one batch, of this or another model."""
        import torch

        model = self.model if model is None else model
        with torch.no_grad(), eval_mode(model):
            logits = supervised_logits(model, self.batch(rows))[0].float()
        return logits.masked_fill(logits < MASKED, 0.0)  # beside them, no difference would be seen

    @contextmanager
    def copy_of_model(self) -> Iterator[Any]:
        """New modules over the same weights, for a check that attaches or replaces something."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        yield copy.deepcopy(self.model, {id(t): t for t in tensors})
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None


def close(a: torch.Tensor, b: torch.Tensor, share: float = 1e-3) -> bool:
    """Whether the largest difference is less than `share` of the largest value."""
    return a.shape == b.shape and bool((a - b).abs().max() <= share * max(float(b.abs().max()), 1e-6))
