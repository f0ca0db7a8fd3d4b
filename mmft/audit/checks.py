"""What must hold before training starts: every answer ends with an end token, and the picture changes the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..collators.base import IGNORE, Collator
from ..common.errors import UserError
from ..common.tensors import eval_mode, to_device
from ..data.augment import chosen, described, sided
from ..losses.supervised import supervised_loss

SAME = 1e-7  # of the loss: the same numbers through the same operations differ by nothing at all


class AuditFailed(UserError):
    """The audit was made, and something is wrong."""

    exit_code = 1


@dataclass
class Check:
    """One question asked: name, what was found, whether it is well (None: could not be asked)."""

    name: str
    found: str
    good: bool | None


@dataclass
class Swapped:
    """A sample that shows other pictures in the places of its own."""

    sample: Any
    pictures: list[Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sample, name)

    def load_images(self) -> list[Any]:
        return self.pictures


def quick(model: Any, collator: Collator, rows: Sequence[Any]) -> list[Check]:
    """The part that training does by itself: the first rows' end tokens, and one batch with its pictures swapped."""
    first = [rows[i] for i in range(min(2, len(rows)))]
    return [end_token(collator, collator(first)), blindness(model, collator, first)]


def augmentation(node: Any, rows: Sequence[Any]) -> list[Check]:
    """Whether training pictures are changed at random, and whether mirroring them fits their texts; nothing where it is off."""
    on = chosen(node)
    if not on:
        return []
    found = [Check("augment", f"on for training pictures: {described(node)}; shown and measured here are pictures as they are", True)]
    if "RandomHorizontalFlip" in on:
        wrong = sided(rows)
        said = f"{len(wrong)} rows name a side, e.g. {wrong[0].id}: mirrored, they may teach the wrong one" if wrong else "no row names a side"
        found.append(Check("mirrored texts", said, None if wrong else True))
    return found


def refuse(checks: list[Check], remedy: str) -> None:
    """Errors raised: AuditFailed, in one line, when a check came out badly."""
    bad = [f"{c.name}: {c.found}" for c in checks if c.good is False]
    if bad:
        raise AuditFailed("; ".join(bad) + remedy)


def end_token(collator: Collator, batch: dict[str, Any]) -> Check:
    """Every run of tokens that carry loss closes with a token that also stops the model when it writes."""
    ends = set(collator.end_ids)
    names = ", ".join(repr(collator.tokenizer.decode(i)) for i in collator.end_ids)
    spans = 0
    for row, labels in zip(batch["row_ids"], batch["labels"].tolist(), strict=True):
        for label, behind in zip(labels, [*labels[1:], IGNORE], strict=True):
            if label == IGNORE or behind != IGNORE:
                continue
            spans += 1
            if label not in ends:
                last = collator.tokenizer.decode(label)
                return Check("end token", f"an answer of {row} closes with {last!r}, and generation stops at {names}: it would never stop", False)
    return Check("end token", f"{spans} answers close with one of {names}", True)


def blindness(model: Any, collator: Collator, rows: Sequence[Any]) -> Check:
    """The loss of rows with their own pictures against others in the same places and of the same size.

    The texts and the number of image tokens stay the same, so any change comes from the pixels.
    """
    with_pictures = [row for row in rows if row.images]
    if not with_pictures:
        return Check("image-blindness", "no row among those looked at has a picture", None)
    for row in with_pictures:  # one by one: two rows with the same words would hide that their pictures were exchanged
        own = _loss(model, collator, [row])
        swapped = _loss(model, collator, [Swapped(row, _others(row, with_pictures))])
        if abs(own - swapped) > SAME * max(own, 1.0):
            return Check("image-blindness", f"loss {own:.4f} with the row's own pictures, {swapped:.4f} with others", True)
    return Check("image-blindness", f"other pictures give the same loss ({own:.6f}): the model does not see them", False)


def _others(row: Any, rows: Sequence[Any]) -> list[Any]:
    """Pictures of another row, made as large as this row's own; without another row, its own turned to negatives."""
    from PIL import ImageOps

    own = row.load_images()
    foreign = [p for other in rows if other.sha256 != row.sha256 for p in other.load_images()]
    if not foreign:
        return [ImageOps.invert(picture) for picture in own]
    return [foreign[i % len(foreign)].resize(picture.size) for i, picture in enumerate(own)]


def _loss(model: Any, collator: Collator, rows: list[Any]) -> float:
    import torch

    with torch.no_grad(), eval_mode(model):
        loss, count = supervised_loss(model, to_device(collator(rows), model.device))
    return loss.item() / max(int(count), 1)
