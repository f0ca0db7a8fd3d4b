"""Shapes: drawn images with answer formats that the tiny base model was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from ..sample import Row
from .drawing import DrawnSource, Item, Scene, random_scene
from .scenes import Turn, drawn_row, seen_at

INVENTORY = "Write the inventory."
MAP = "Write the map."
#: A question about the outermost shape, and the grid column or row that it compares; the smallest number wins.
COMPARISONS: tuple[tuple[str, Callable[[Item], int]], ...] = (
    ("Which shape is furthest left?", lambda item: item.column),
    ("Which shape is furthest right?", lambda item: -item.column),
    ("Which shape is highest?", lambda item: item.row),
    ("Which shape is lowest?", lambda item: -item.row),
)


@dataclass(kw_only=True)
class Shapes(DrawnSource):
    """Images with one question each: half ask for the inventory, half for the map. For the other keys see DrawnSource.

    A share `comparisons` of the images asks which shape is outermost instead.
    """

    name: str = "shapes"
    pictures: int = 1728
    comparisons: float = 0.0
    fewest: int = 2
    most: int = 3

    def read(self) -> Iterator[Row]:
        for number in range(self.pictures):
            rng = Random(f"shapes/{self.seed}/{number}")
            scene = random_scene(rng, self.side, self.fewest, self.most)
            turn = comparison(rng, scene) if rng.random() < self.comparisons else None
            yield drawn_row(f"shape-{number:06d}", scene, [turn or rng.choice((inventory, positions))(scene)])


def inventory(scene: Scene) -> Turn:
    """Every shape in reading order: `red star: top left; blue circle: center`."""
    return INVENTORY, "; ".join(f"{item.color} {item.kind}: {item.place}" for item in scene.items)


def positions(scene: Scene) -> Turn:
    """The same with the places first: `in the top left: red star; in the center: blue circle`."""
    return MAP, "; ".join(f"{seen_at(item.place)}: {item.color} {item.kind}" for item in scene.items)


def comparison(rng: Random, scene: Scene) -> Turn | None:
    """A question about the only shape in an outermost row or column; None if there is no such shape."""
    for question, key in rng.sample(COMPARISONS, len(COMPARISONS)):
        first, *others = sorted(scene.items, key=key)
        if not others or key(first) < key(others[0]):
            return question, f"{first.color} {first.kind}"
    return None
