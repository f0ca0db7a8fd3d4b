"""Random augmentation of training images with torchvision's transforms.

Random numbers are drawn from (seed, epoch, row, image number), so a resumed run draws the same ones. Only training rows are wrapped:
evaluation, prediction and reports see the original images.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.records import Region
from ..config.choices import AUGMENT_TRANSFORMS
from .sample import Message, Sample, has_regions, message_text, regions_of

if TYPE_CHECKING:
    import torch
    from PIL import Image

Section = Mapping[str, Any] | None  # the config's section `augment`: transform -> its keys

log = logging.getLogger("mmft")


SIDES = re.compile(r"\b(left|right|clockwise|anticlockwise|counterclockwise)\b|[左右]", re.IGNORECASE)
CHECKED_ROWS = 2000  # rows that are searched for words naming a side
LEAST_SHARE = 0.5  # of a box's area that must stay in the image, else the transforms are drawn again
DRAWS = 10  # of the transforms for one image; then it stays as it is


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
        return self._changed(image, [], *key)[0]

    def change_with(self, image: Image.Image, regions: Sequence[Region], *key: int) -> tuple[Image.Image, list[Region]]:
        """`change`, and where the boxes and points of the image then are, cut to it.

        A draw that takes a point, or half of a box, out of the image is drawn again; after DRAWS draws the image stays as it is.
        """
        from torchvision.tv_tensors import BoundingBoxes

        if not regions:
            return self.change(image, *key), []
        size = (image.height, image.width)
        # not clamped, so that it can be told how much of a box has left the image; torchvision's key points always are, so a point is a small box
        boxes = [BoundingBoxes([r["box"] if "box" in r else _around(r["point"])], format="XYXY", canvas_size=size, clamping_mode=None) for r in regions]
        for draw in range(DRAWS):
            changed, moved = self._changed(image, boxes, *key, *([draw] if draw else []))
            kept = [_cut(region, box.flatten().tolist(), image.size) for region, box in zip(regions, moved, strict=True)]
            if None not in kept:
                return changed, [region for region in kept if region is not None]
        return image, list(regions)

    def _changed(self, image: Image.Image, boxes: Sequence[torch.Tensor], *key: int) -> tuple[Image.Image, list[torch.Tensor]]:
        """One draw of all transforms, for the image and its boxes together."""
        import torch
        from torchvision.transforms.v2 import functional

        state = torch.default_generator.get_state()
        digest = hashlib.sha256(" ".join(map(str, (self.seed, *key))).encode()).digest()
        moved = list(boxes)
        # not torch.manual_seed, which would also seed the devices
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        try:
            for name, transform in self.transforms.items():
                if name == "RandomResizedCrop":
                    width, height = image.size
                    draw = type(transform)(image.size[::-1], scale=transform.scale, ratio=[r * width / height for r in transform.ratio])
                    cut = {**draw.make_params([image]), "size": [height, width]}
                    image, *moved = (functional.resized_crop(one, **cut) for one in (image, *moved))
                elif moved:
                    image, *moved = transform(image, *moved)
                else:
                    image = transform(image)
        finally:
            torch.default_generator.set_state(state)
        return image, moved


def _around(point: Sequence[float]) -> list[float]:
    """A box whose centre is the point."""
    x, y = point
    return [x - 0.5, y - 0.5, x + 0.5, y + 0.5]


def _cut(region: Region, values: list[float], size: tuple[int, int]) -> Region | None:
    """The region with these coordinates, cut to the image; None if too little of it is in the image."""
    if "point" in region:
        values = [(values[0] + values[2]) / 2, (values[1] + values[3]) / 2]
    inside = [round(min(max(v, 0.0), float(size[i % 2])), 3) for i, v in enumerate(values)]
    if "point" in region:
        return {**region, "point": inside} if all(abs(a - b) < 0.001 for a, b in zip(values, inside)) else None
    area = (values[2] - values[0]) * (values[3] - values[1])
    left = (inside[2] - inside[0]) * (inside[3] - inside[1])
    return {**region, "box": inside} if left > 0 and left >= LEAST_SHARE * area else None


class AugmentedSample:
    """A sample whose load_images returns augmented images, with boxes that moved with them; all other attributes are the sample's."""

    def __init__(self, row: Sample, rows: Augmented, epoch: int, index: int) -> None:
        self._row, self._rows, self._key = row, rows, (epoch, index)
        self._moved: tuple[list[Image.Image], list[Message]] | None = None  # images and messages of a row with boxes

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # while a copy is unpickled, it has no row yet
            raise AttributeError(name)
        return getattr(self._row, name)

    def load_images(self) -> list[Image.Image]:
        if has_regions(self._row.messages):
            return self._with_boxes()[0]
        return [self._rows.change(image, *self._key, number) for number, image in enumerate(self._row.load_images())]

    @property
    def messages(self) -> list[Message]:
        return self._with_boxes()[1] if has_regions(self._row.messages) else self._row.messages

    @property
    def regions(self) -> list[Region]:
        return regions_of(self.messages[-1]["content"])

    def _with_boxes(self) -> tuple[list[Image.Image], list[Message]]:
        if self._moved is None:
            messages = copy.deepcopy(self._row.messages)
            regions = [region for message in messages for region in regions_of(message["content"])]
            images = []
            for number, image in enumerate(self._row.load_images()):
                own = [region for region in regions if region["image"] == number]
                changed, moved = self._rows.change_with(image, own, *self._key, number)
                images.append(changed)
                for region, new in zip(own, moved, strict=True):
                    region.update(new)
            self._moved = images, messages
        return self._moved


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
