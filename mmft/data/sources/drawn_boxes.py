"""DrawnBoxes: drawn images that ask where shapes are; the boxes are known because the shapes were drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from ...common.records import Region
from ..sample import Message, Row, user_turn
from .drawing import DrawnSource, Item, Scene, draw, png, random_scene

ALL = "Find all shapes."


@dataclass(kw_only=True)
class DrawnBoxes(DrawnSource):
    """Images with one question each: where the only shape of its colour and kind is. For the other keys see DrawnSource.

    A share `lists` of the images asks for all shapes instead, as a list of labelled boxes in reading order.
    """

    name: str = "drawn_boxes"
    pictures: int = 1728
    lists: float = 0.0
    fewest: int = 2
    most: int = 3

    def read(self) -> Iterator[Row]:
        for number in range(self.pictures):
            rng = Random(f"boxes/{self.seed}/{number}")
            scene = random_scene(rng, self.side, self.fewest, self.most)
            alone = [item for item in scene.items if [_name(other) for other in scene.items].count(_name(item)) == 1]
            messages = listed(scene) if rng.random() < self.lists or not alone else located(rng.choice(alone))
            name = f"box-{number:06d}"
            yield Row(id=name, images=[png(draw(scene))], messages=messages, references=[], where=name)


def located(item: Item) -> list[Message]:
    """The question for one shape, and its box."""
    return [user_turn(1, f"Where is the {_name(item)}?"), {"role": "assistant", "content": [{"type": "box", "region": region(item)}]}]


def listed(scene: Scene) -> list[Message]:
    """The question for all shapes, and their list."""
    return [user_turn(1, ALL), {"role": "assistant", "content": [{"type": "regions", "regions": [region(item) for item in scene.items]}]}]


def region(item: Item) -> Region:
    return {"label": _name(item), "image": 0, "box": [float(v) for v in item.box]}


def _name(item: Item) -> str:
    return f"{item.color} {item.kind}"
