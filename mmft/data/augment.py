"""Training pictures changed at random: torchvision's own transforms, drawn by seed, epoch and row, so that a run that goes on draws the same.

Only the rows of training are wrapped; what is measured, predicted or shown never passes here.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..config.library_keys import AUGMENT_TRANSFORMS

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("mmft")


SIDES = re.compile(r"\b(left|right|clockwise|anticlockwise|counterclockwise)\b|[左右]", re.IGNORECASE)
LOOKED_AT = 2000  # rows in which words for a side are looked for


def chosen(node: Any) -> dict[str, dict[str, Any]]:
    """The transforms that are on, in the order in which they are applied; empty for none."""
    return {name: node[name] for name in AUGMENT_TRANSFORMS if (node or {}).get(name) is not None}


def described(node: Any) -> str:
    """`RandomRotation(degrees=5), ColorJitter(brightness=0.2)`"""
    return ", ".join(f"{name}({', '.join(f'{k}={v}' for k, v in keys.items())})" for name, keys in chosen(node).items())


def augmented(rows: Sequence[Any], node: Any, seed: int) -> Sequence[Any]:
    """The training rows, their pictures changed as the section `augment` says; the rows themselves where it says nothing.

    Errors raised: UserError for values that torchvision refuses.
    """
    transforms = made(node)
    if not transforms:
        return rows
    log.info("%-14s %s, on training pictures alone", "augment", described(node))
    if "RandomHorizontalFlip" in transforms and (wrong := sided(rows)):
        log.warning("%-14s RandomHorizontalFlip mirrors pictures whose texts name a side, e.g. row %s (%d of the first %d rows): they would be taught wrongly;"
                    " leave it out, or such rows", "augment", wrong[0].id, len(wrong), min(len(rows), LOOKED_AT))  # fmt: skip
    return Augmented(rows, transforms, seed)


def made(node: Any) -> dict[str, Any]:
    """name -> torchvision's transform. Errors raised: UserError."""
    on = chosen(node)
    if not on:
        return {}
    from PIL import Image
    from torchvision.transforms import v2

    transforms = {}
    for name, keys in on.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a range the wrong way round
                transforms[name] = getattr(v2, name)(**({"size": 1} if name == "RandomResizedCrop" else {}), **keys)
                if name == "RandomResizedCrop" and not (0 < transforms[name].scale[0] <= 1 and 0 < transforms[name].scale[1] <= 1 and transforms[name].ratio[0] > 0):
                    raise ValueError("scale is a share of the picture, above 0 and at most 1, and ratio is above 0")
                Augmented([], {name: transforms[name]}, 0).change(Image.new("RGB", (8, 6)))
        except (ValueError, TypeError, UserWarning) as error:
            raise UserError(f"augment.{name}: {' '.join(str(error).split())}") from None
    return transforms


def sided(rows: Sequence[Any]) -> list[Any]:
    """Of the first rows, those whose texts name a side."""
    first = (rows[i] for i in range(min(len(rows), LOOKED_AT)))
    return [r for r in first if any(SIDES.search(part.get("text", "")) for message in r.messages for part in message["content"])]


class Augmented(Sequence):
    """Rows asked for as (epoch, index) come with changed pictures; asked for by index alone, as they are.

    The epoch comes with the index, from the sampler: a data set that is told its epoch is told a wrong one when a run goes on,
    and its copies in workers are told none.
    """

    def __init__(self, rows: Sequence[Any], transforms: dict[str, Any], seed: int):
        self.rows, self.transforms, self.seed = rows, transforms, seed
        self.epoch = 0  # set before each epoch, in the process that samples

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: Any) -> Any:
        if not isinstance(place, tuple):
            return self.rows[place]
        epoch, index = place
        return Changed(self.rows[index], self, epoch, index)

    def follow(self, loader: Any) -> None:
        """Have a prepared data loader ask for (epoch, index), in the order it would have had."""
        holder = loader.batch_sampler
        while hasattr(holder, "batch_sampler"):  # of several processes, each takes its share of one
            holder = holder.batch_sampler
        if not hasattr(holder, "sampler"):
            raise UserError("augment: this trainer.train_sampling_strategy makes batches in a way that leaves out the epoch; use random, or augment=null")
        holder.sampler = WithEpoch(holder.sampler, self)

    def change(self, picture: Image.Image, *place: int) -> Image.Image:
        """The picture as drawn for this place (epoch, row, number in the row); the global random numbers stay where they are."""
        import torch
        from torchvision.transforms.v2 import functional

        kept = torch.default_generator.get_state()
        key = hashlib.sha256(" ".join(map(str, (self.seed, *place))).encode()).digest()
        # not torch.manual_seed, which would seed the devices, too
        torch.default_generator.manual_seed(int.from_bytes(key[:8], "big") >> 1)
        try:
            for name, transform in self.transforms.items():
                if name == "RandomResizedCrop":
                    width, height = picture.size
                    draw = type(transform)(picture.size[::-1], scale=transform.scale, ratio=[r * width / height for r in transform.ratio])
                    picture = functional.resized_crop(picture, **draw.make_params([picture]), size=[height, width])
                else:
                    picture = transform(picture)
        finally:
            torch.default_generator.set_state(kept)
        return picture


class Changed:
    """A row with its pictures changed; in all else the row."""

    def __init__(self, row: Any, rows: Augmented, epoch: int, index: int):
        self._row, self._rows, self._place = row, rows, (epoch, index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # a copy that is being unpickled has no row yet
            raise AttributeError(name)
        return getattr(self._row, name)

    def load_images(self) -> list[Any]:
        return [self._rows.change(picture, *self._place, number) for number, picture in enumerate(self._row.load_images())]


class WithEpoch:
    """A sampler's indices, each with the epoch that is being trained."""

    def __init__(self, sampler: Any, rows: Augmented):
        self.sampler, self.rows = sampler, rows

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.rows.epoch, index) for index in self.sampler)
