"""Draw small scenes of flat, non-overlapping shapes; the same on every machine for a seed."""

from __future__ import annotations

import functools
import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from ...common.errors import UserError
from .base import BaseSource, Stamp

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

KINDS = ("circle", "square", "triangle", "star", "diamond", "cross", "heart", "ring")
COLORS = {
    "red": (219, 50, 54),
    "orange": (247, 140, 30),
    "yellow": (250, 208, 45),
    "green": (60, 160, 75),
    "blue": (45, 105, 210),
    "purple": (140, 75, 175),
    "brown": (125, 80, 50),
    "black": (40, 40, 45),
}
BACKGROUNDS = ((255, 255, 255), (250, 246, 236), (236, 243, 250), (240, 240, 240))
PLACES = (
    ("top left", "top", "top right"),
    ("left", "center", "right"),
    ("bottom left", "bottom", "bottom right"),
)
#: Half the width of a shape as a share of the image's side. The ranges are far apart, so that sizes are unambiguous.
RADII = {"small": (0.075, 0.080, 0.085), "big": (0.130, 0.135, 0.140)}
#: Minimum distance from the edge of its cell, as a share of the image's side, so that neighbours do not touch.
MARGIN = 0.012
#: Anti-aliasing: a mask is drawn this many times larger and averaged down.
OVERSAMPLE = 4


@dataclass(frozen=True)
class Item:
    """One shape. `row` and `column` are its cell of the 3 x 3 grid, `x`, `y`, `radius` are pixels."""

    kind: str
    color: str
    size: str
    row: int
    column: int
    x: int
    y: int
    radius: int

    @property
    def place(self) -> str:
        return PLACES[self.row][self.column]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom in pixels; right and bottom are just outside."""
        return self.x - self.radius, self.y - self.radius, self.x + self.radius, self.y + self.radius


@dataclass(frozen=True)
class Scene:
    """A square picture of `side` pixels; `items` are in reading order (row by row, left to right)."""

    side: int
    background: tuple[int, int, int]
    items: tuple[Item, ...]


def random_scene(rng: Random, side: int, fewest: int, most: int) -> Scene:
    """A scene of `fewest` to `most` shapes (1 to 9), each in a cell of its own, so that none overlap."""
    cells = sorted(rng.sample(range(9), rng.randint(fewest, most)))
    background = rng.choice(BACKGROUNDS)
    return Scene(side, background, tuple(_random_item(rng, side, *divmod(cell, 3)) for cell in cells))


def _random_item(rng: Random, side: int, row: int, column: int) -> Item:
    kind, color, size = rng.choice(KINDS), rng.choice(tuple(COLORS)), rng.choice(tuple(RADII))
    radius = max(2, round(rng.choice(RADII[size]) * side))
    low, cell = radius + math.ceil(MARGIN * side), side / 3
    x = rng.randint(math.ceil(column * cell) + low, math.floor((column + 1) * cell) - low)
    y = rng.randint(math.ceil(row * cell) + low, math.floor((row + 1) * cell) - low)
    return Item(kind, color, size, row, column, x, y, radius)


@dataclass(kw_only=True)
class DrawnSource(BaseSource):
    """`pictures` images with `fewest` to `most` shapes (1 to 9). side: image size in pixels. seed: another seed draws another set."""

    pictures: int
    side: int = 168
    fewest: int
    most: int
    seed: int = 0
    near_distance: int | None = None  # drawings of other things in the same places look alike, and are no copies

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, low, high in (("pictures", 1, 10**7), ("side", 48, 4096), ("fewest", 1, 9), ("most", 1, 9)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise UserError(f"data.{key}={value}: give a whole number from {low} to {high}")
        if self.fewest > self.most:
            raise UserError(f"data.fewest={self.fewest} is more than data.most={self.most}")

    def stamp(self) -> Stamp:
        """A hash of the drawing code: after a change of the code, sets prepared earlier are not used again."""
        here = Path(__file__).parent
        code = [(here / name).read_text(encoding="utf-8") for name in ("drawing.py", "scenes.py", "shapes.py")]
        return {"code": hashlib.sha256("".join(code).encode()).hexdigest()}

    def total(self) -> int:
        return self.pictures


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    from PIL import Image

    picture = Image.new("RGB", (scene.side, scene.side), scene.background)
    for item in scene.items:
        picture.paste(COLORS[item.color], item.box, _mask(item.kind, item.radius))
    return picture


def png(picture: Image.Image) -> bytes:
    """The image as PNG bytes; light compression takes a third of the time of the strongest."""
    target = io.BytesIO()
    picture.save(target, "PNG", compress_level=3)
    return target.getvalue()


@functools.lru_cache(maxsize=256)
def _mask(kind: str, radius: int) -> Image.Image:
    """How much of each pixel the shape covers, 0 to 255, as a picture of 2 * radius pixels."""
    from PIL import Image, ImageDraw

    half = radius * OVERSAMPLE
    mask = Image.new("L", (2 * half, 2 * half), 0)
    pen = ImageDraw.Draw(mask)
    if kind in ("circle", "ring"):
        _disc(pen, half, 0.94, 255)
        if kind == "ring":
            _disc(pen, half, 0.50, 0)
    else:
        pen.polygon([(round(half * (1 + x)), round(half * (1 + y))) for x, y in _outline(kind)], fill=255)
    return mask.reduce(OVERSAMPLE)


def _disc(pen: ImageDraw.ImageDraw, half: int, radius: float, fill: int) -> None:
    reach = round(half * radius)
    pen.ellipse((half - reach, half - reach, half + reach - 1, half + reach - 1), fill=fill)


def _outline(kind: str) -> list[tuple[float, float]]:
    """Corners of the shape in a square from -1 to 1, y downwards."""
    if kind == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if kind == "triangle":
        return [(0.0, -0.92), (0.98, 0.78), (-0.98, 0.78)]
    if kind == "diamond":
        return [(0.0, -1.0), (0.68, 0.0), (0.0, 1.0), (-0.68, 0.0)]
    if kind == "cross":
        arm, reach = 0.3, 0.95
        corner = [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
        return corner + [(-x, -y) for x, y in corner]
    if kind == "star":
        radii = (1.0, 0.42)
        turns = [(radii[i % 2], math.pi * i / 5) for i in range(10)]
        return [(r * math.sin(turn), 0.05 - r * math.cos(turn)) for r, turn in turns]
    if kind == "heart":
        return [_heart(2 * math.pi * i / 60) for i in range(60)]
    raise ValueError(f"no such shape: {kind}")


def _heart(turn: float) -> tuple[float, float]:
    """A point of the usual heart curve (16 sin^3, 13 cos - 5 cos 2 - 2 cos 3 - cos 4), brought into -1 to 1."""
    x = 16 * math.sin(turn) ** 3
    y = 13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)
    return 0.94 * x / 16, -0.94 * (y + 2.5) / 15
