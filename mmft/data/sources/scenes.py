"""Scenes: drawn images with captions and simple questions, the pretraining data of the tiny base model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random

from ..sample import Message, Row, assistant_turn, user_turn
from .drawing import COLORS, KINDS, PLACES, DrawnSource, Item, Scene, draw, png, random_scene

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ALL_PLACES = tuple(place for row in PLACES for place in row)
#: A question and its answer; None for a question that the scene does not allow ("the star" where there are two).
Turn = tuple[str, str]


@dataclass(kw_only=True)
class Scenes(DrawnSource):
    """Images, each with `turns` questions of different kinds, as one chat of several turns. For the other keys see DrawnSource.

    A share `captions` of the images has the caption as its only turn: captions name all attributes of every shape, so a
    model learns from them first.
    """

    name: str = "scenes"
    pictures: int = 60000
    captions: float = 0.35
    turns: int = 3
    fewest: int = 1
    most: int = 4

    def read(self) -> Iterator[Row]:
        for number in range(self.pictures):
            rng = Random(f"scenes/{self.seed}/{number}")
            scene = random_scene(rng, self.side, self.fewest, self.most)
            turns = [_caption(rng, scene)] if rng.random() < self.captions else several_turns(rng, scene, self.turns)
            yield drawn_row(f"scene-{number:06d}", scene, turns)


def drawn_row(name: str, scene: Scene, turns: list[Turn]) -> Row:
    """The row of one scene; its image stands before the first question."""
    messages: list[Message] = []
    for question, answer in turns:
        messages += [user_turn(0 if messages else 1, question), assistant_turn(answer)]
    return Row(id=name, images=[png(draw(scene))], messages=messages, references=[turns[-1][1]], where=name)


def several_turns(rng: Random, scene: Scene, count: int) -> list[Turn]:
    """`count` questions in random order, of different kinds as far as the scene allows."""
    turns: list[Turn] = []
    while len(turns) < count:
        kinds = rng.sample(QUESTIONS, len(QUESTIONS))
        possible = [turn for ask in kinds if (turn := ask(rng, scene)) is not None]
        turns += possible[: count - len(turns)]
    return turns


def listed(words: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def seen_at(place: str) -> str:
    """`in the top left`, `on the left`, `at the top`, `in the center`."""
    preposition = {"left": "on", "right": "on", "top": "at", "bottom": "at"}.get(place, "in")
    return f"{preposition} the {place}"


def _caption(rng: Random, scene: Scene) -> Turn:
    words = [f"a {item.size} {item.color} {item.kind} {seen_at(item.place)}" for item in scene.items]
    return rng.choice(("Describe the picture.", "What do you see?")), listed(words) + "."


def _names(rng: Random, scene: Scene) -> Turn:
    return rng.choice(("Name the shapes.", "Which shapes are there?")), listed([a(i.kind) for i in scene.items]) + "."


def _colors(rng: Random, scene: Scene) -> Turn:
    colors = list(dict.fromkeys(item.color for item in scene.items))
    return rng.choice(("Which colors are there?", "Name the colors.")), listed(colors) + "."


def _color(rng: Random, scene: Scene) -> Turn | None:
    item = _only(rng, scene, "kind")
    return (f"What color is the {item.kind}?", f"{item.color}.") if item else None


def _kind(rng: Random, scene: Scene) -> Turn | None:
    item = _only(rng, scene, "color")
    return (f"Which shape is {item.color}?", f"the {item.kind}.") if item else None


def _count(rng: Random, scene: Scene) -> Turn:
    return "How many shapes are there?", NUMBERS[len(scene.items)] + "."


def _count_color(rng: Random, scene: Scene) -> Turn:
    color = rng.choice([item.color for item in scene.items] + [rng.choice(tuple(COLORS))])
    return f"How many shapes are {color}?", NUMBERS[sum(item.color == color for item in scene.items)] + "."


def _where(rng: Random, scene: Scene) -> Turn | None:
    item = _only(rng, scene, "kind")
    return (f"Where is the {item.kind}?", seen_at(item.place) + ".") if item else None


def _at(rng: Random, scene: Scene) -> Turn:
    place = rng.choice([item.place for item in scene.items] + [rng.choice(ALL_PLACES)])
    here = [f"{a(item.color)} {item.kind}" for item in scene.items if item.place == place]
    return f"What is {seen_at(place)}?", (here or ["nothing"])[0] + "."


def _is_there(rng: Random, scene: Scene) -> Turn:
    """Half of the answers are yes; the others ask with one word changed, so that both words matter."""
    item = rng.choice(scene.items)
    color, kind = item.color, item.kind
    if rng.random() < 0.5:
        if rng.random() < 0.5:
            color = rng.choice([name for name in COLORS if name != color])
        else:
            kind = rng.choice([name for name in KINDS if name != kind])
    there = any((item.color, item.kind) == (color, kind) for item in scene.items)
    return f"Is there {a(color)} {kind}?", "yes." if there else "no."


def _size(rng: Random, scene: Scene) -> Turn | None:
    item = _only(rng, scene, "kind")
    return (f"Is the {item.kind} big or small?", f"{item.size}.") if item else None


QUESTIONS: tuple[Callable[[Random, Scene], Turn | None], ...] = (
    _caption,
    _names,
    _colors,
    _color,
    _kind,
    _count,
    _count_color,
    _where,
    _at,
    _is_there,
    _size,
)


def _only(rng: Random, scene: Scene, word: str) -> Item | None:
    """An item whose `word` (kind or color) no other item has."""
    values = [getattr(item, word) for item in scene.items]
    alone = [item for item, value in zip(scene.items, values, strict=True) if values.count(value) == 1]
    return rng.choice(alone) if alone else None
