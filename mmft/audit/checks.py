"""Checks before training: every answer ends with an end token, and the image changes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..collators.base import IGNORE
from ..collators.types import Batch, BatchMaker
from ..common.errors import Incomplete
from ..common.tensors import eval_mode, to_device
from ..data.augment import active_transforms, describe_transforms, rows_naming_sides
from ..data.selection import alternating, parts_of
from ..losses.supervised import supervised_loss

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from ..data.sample import Sample

SAME = 1e-7  # relative; the same numbers through the same operations do not differ at all


class AuditFailed(Incomplete):
    """A check of the audit failed; its page was written."""


@dataclass
class Check:
    """The result of one check. passed: None if it could not be made. detail: what was seen, in one line."""

    name: str
    detail: str
    passed: bool | None


@dataclass
class SwappedImages:
    """A sample with other images in place of its own."""

    sample: Sample
    images_shown: list[Image.Image]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sample, name)

    def load_images(self) -> list[Image.Image]:
        return self.images_shown


def quick_checks(model: torch.nn.Module, collator: BatchMaker, rows: Sequence[Sample]) -> list[Check]:
    """The checks that training makes: end tokens and image-blindness of the first two rows, of a mix of the first row of each source."""
    in_turn = alternating(rows)
    first = [in_turn[i] for i in range(min(max(2, len(parts_of(rows))), len(rows)))]
    return [check_end_token(collator, collator(first)), check_blindness(model, collator, first)]


def check_augmentation(node: dict[str, Any] | None, rows: Sequence[Sample]) -> list[Check]:
    """What the config section `augment` does to training images, and whether mirroring fits the texts; [] if it is off."""
    on = active_transforms(node)
    if not on:
        return []
    checks = [Check("augment", f"on for training pictures: {describe_transforms(node)}; shown and measured here are pictures as they are", True)]
    if "RandomHorizontalFlip" in on:
        wrong = rows_naming_sides(rows)
        detail = f"{len(wrong)} rows name a side, e.g. {wrong[0].id}: mirrored, they may teach the wrong one" if wrong else "no row names a side"
        checks.append(Check("mirrored texts", detail, None if wrong else True))
    return checks


def raise_failed(checks: list[Check], remedy: str, result: object = None) -> None:
    """Raise AuditFailed with one line for all failed checks, if any; `remedy` is appended. result: of the audit, for `--json`."""
    failed = [f"{c.name}: {c.detail}" for c in checks if c.passed is False]
    if failed:
        raise AuditFailed("; ".join(failed) + remedy, result)


def check_end_token(collator: BatchMaker, batch: Batch) -> Check:
    """Every run of tokens with loss must end with a token that also stops generation."""
    ends = set(collator.end_ids)
    names = ", ".join(repr(collator.tokenizer.decode(i)) for i in collator.end_ids)
    spans = 0
    for row, labels in zip(batch["row_ids"], batch["labels"].tolist(), strict=True):
        for label, following in zip(labels, [*labels[1:], IGNORE], strict=True):
            if label == IGNORE or following != IGNORE:
                continue
            spans += 1
            if label not in ends:
                last = collator.tokenizer.decode(label)
                return Check("end token", f"an answer of {row} closes with {last!r}, and generation stops at {names}: it would never stop", False)
    return Check("end token", f"{spans} answers close with one of {names}", True)


def check_blindness(model: torch.nn.Module, collator: BatchMaker, rows: Sequence[Sample]) -> Check:
    """The loss of a row must change when its images are replaced by others of the same size.

    Text and number of image tokens stay the same, so any change comes from the pixels.
    """
    with_images = [row for row in rows if row.images]
    if not with_images:
        return Check("image-blindness", "no row among those looked at has a picture", None)
    for row in with_images:  # one by one: in one batch, exchanging the images of two rows with equal texts changes nothing
        own = _loss(model, collator, row)
        swapped = _loss(model, collator, SwappedImages(row, _other_images(row, with_images)))
        if abs(own - swapped) > SAME * max(own, 1.0):
            return Check("image-blindness", f"loss {own:.4f} with the row's own pictures, {swapped:.4f} with others", True)
    return Check("image-blindness", f"other pictures give the same loss ({own:.6f}): the model does not see them", False)


def _other_images(row: Sample, rows: Sequence[Sample]) -> list[Image.Image]:
    """Images of another row, resized to this row's own; without another row, the negatives of its own."""
    from PIL import ImageOps

    own = row.load_images()
    others = [image for other in rows if other.sha256 != row.sha256 for image in other.load_images()]
    if not others:
        return [ImageOps.invert(image) for image in own]
    return [others[i % len(others)].resize(image.size) for i, image in enumerate(own)]


def _loss(model: Any, collator: BatchMaker, row: Any) -> float:
    """Mean loss of one row (a Sample or SwappedImages)."""
    import torch

    with torch.no_grad(), eval_mode(model):
        loss, count = supervised_loss(model, to_device(collator([row]), model.device))
    return loss.item() / max(int(count), 1)
