"""Random augmentation of training images with torchvision's transforms.

Random numbers are drawn from (seed, epoch, row, image number), so a resumed run draws the same ones. Only training rows are wrapped:
evaluation, prediction and reports see the original images.
"""

from __future__ import annotations

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..config.choices import AUGMENT_TRANSFORMS
from .sample import Sample, message_text

if TYPE_CHECKING:
    from PIL import Image

Section = Mapping[str, Any] | None  # the config's section `augment`: transform -> its keys

log = logging.getLogger("mmft")


SIDES = re.compile(r"\b(left|right|clockwise|anticlockwise|counterclockwise)\b|[左右]", re.IGNORECASE)
CHECKED_ROWS = 2000  # rows that are searched for words naming a side


def active_transforms(node: Section) -> dict[str, dict[str, Any]]:
    """The keys of each active transform, in the order in which they are applied."""
    section = node or {}
    return {name: section[name] for name in AUGMENT_TRANSFORMS if section.get(name) is not None}


def describe_transforms(node: Section) -> str:
    """`RandomRotation(degrees=5), ColorJitter(brightness=0.2)`"""
    return ", ".join(f"{name}({', '.join(f'{k}={v}' for k, v in keys.items())})" for name, keys in active_transforms(node).items())


def augment_rows(rows: Sequence[Sample], node: Section, seed: int) -> Sequence[Any]:
    """The training rows with the augmentation of the config's section `augment`; unchanged if no transform is active.

    Raises UserError for values that torchvision refuses.
    """
    transforms = build_transforms(node)
    if not transforms:
        return rows
    log.info("%-14s %s, on training images only", "augment", describe_transforms(node))
    if "RandomHorizontalFlip" in transforms and (sided := rows_naming_sides(rows)):
        log.warning("%-14s RandomHorizontalFlip mirrors images whose texts name a side, e.g. row %s (%d of the first %d rows), which then are wrong;"
                    " leave out the transform, or such rows", "augment", sided[0].id, len(sided), min(len(rows), CHECKED_ROWS))  # fmt: skip
    return Augmented(rows, transforms, seed)


def build_transforms(node: Section) -> dict[str, Any]:
    """name -> torchvision transform. Raises UserError for values that torchvision refuses."""
    active = active_transforms(node)
    if not active:
        return {}
    from PIL import Image
    from torchvision.transforms import v2

    transforms = {}
    for name, keys in active.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # torchvision only warns about reversed ranges
                transforms[name] = getattr(v2, name)(**({"size": 1} if name == "RandomResizedCrop" else {}), **keys)
                if name == "RandomResizedCrop" and not (0 < transforms[name].scale[0] <= 1 and 0 < transforms[name].scale[1] <= 1 and transforms[name].ratio[0] > 0):
                    raise ValueError("scale is a share of the image, above 0 and at most 1, and ratio is above 0")
                Augmented([], {name: transforms[name]}, 0).change(Image.new("RGB", (8, 6)))
        except (ValueError, TypeError, UserWarning) as error:
            raise UserError(f"augment.{name}: {' '.join(str(error).split())}") from None
    return transforms


def rows_naming_sides(rows: Sequence[Sample]) -> list[Sample]:
    """Those of the first rows whose texts name a side."""
    first = (rows[i] for i in range(min(len(rows), CHECKED_ROWS)))
    return [r for r in first if any(SIDES.search(message_text(message)) for message in r.messages)]


class Augmented(Sequence[Any]):
    """Training rows: indexed by (epoch, index) with augmented images, by index alone with the original ones.

    The sampler passes the epoch with the index: `set_epoch` of a data set gets a wrong epoch when a run is resumed, and does not
    reach the copies in data workers.
    """

    def __init__(self, rows: Sequence[Sample], transforms: dict[str, Any], seed: int) -> None:
        self.rows, self.transforms, self.seed = rows, transforms, seed
        self.epoch = 0  # set before each epoch, in the process of the sampler

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, tuple):
            return self.rows[key]
        epoch, index = key
        return AugmentedSample(self.rows[index], self, epoch, index)

    def follow(self, loader: Any) -> None:
        """Make a prepared data loader ask for (epoch, index), in unchanged order. Raises UserError for an unknown batch sampler."""
        holder = loader.batch_sampler
        while hasattr(holder, "batch_sampler"):  # with several processes, accelerate wraps the batch sampler
            holder = holder.batch_sampler
        if not hasattr(holder, "sampler"):
            raise UserError("augment: this trainer.train_sampling_strategy builds batches without this sampler, so the epoch is unknown; use random, or augment=null")
        holder.sampler = WithEpoch(holder.sampler, self)

    def change(self, image: Image.Image, *key: int) -> Image.Image:
        """The image augmented with random numbers drawn from `key` (epoch, row, number in the row); global random state is kept."""
        import torch
        from torchvision.transforms.v2 import functional

        state = torch.default_generator.get_state()
        digest = hashlib.sha256(" ".join(map(str, (self.seed, *key))).encode()).digest()
        # not torch.manual_seed, which would also seed the devices
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        try:
            for name, transform in self.transforms.items():
                if name == "RandomResizedCrop":
                    width, height = image.size
                    draw = type(transform)(image.size[::-1], scale=transform.scale, ratio=[r * width / height for r in transform.ratio])
                    image = functional.resized_crop(image, **draw.make_params([image]), size=[height, width])
                else:
                    image = transform(image)
        finally:
            torch.default_generator.set_state(state)
        return image


class AugmentedSample:
    """A sample whose load_images returns augmented images; all other attributes are the sample's."""

    def __init__(self, row: Sample, rows: Augmented, epoch: int, index: int) -> None:
        self._row, self._rows, self._key = row, rows, (epoch, index)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while a copy is unpickled, it has no row yet
            raise AttributeError(name)
        return getattr(self._row, name)

    def load_images(self) -> list[Image.Image]:
        return [self._rows.change(image, *self._key, number) for number, image in enumerate(self._row.load_images())]


class WithEpoch:
    """A sampler that yields (current epoch, index) for each index of another sampler."""

    def __init__(self, sampler: Any, rows: Augmented) -> None:
        self.sampler, self.rows = sampler, rows

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sampler":
            raise AttributeError(name)
        return getattr(self.sampler, name)

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.rows.epoch, index) for index in self.sampler)
