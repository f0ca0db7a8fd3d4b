"""Drawn sets: the same everywhere, shapes apart, and every answer true of the picture as its pixels show it."""

import io
import re
from random import Random

import pytest
from PIL import Image
from small import make

from mmft.common.errors import UserError
from mmft.data.sources.drawing import COLORS, KINDS, draw, random_scene
from mmft.data.sources.scenes import ALL_PLACES, NUMBERS, QUESTIONS, Scenes
from mmft.data.sources.shapes import COMPARISONS, INVENTORY, MAP, Shapes

SIDE = 168


def read(png):
    """What is in the picture, from its pixels alone: [{kind, color, size, place, x, y}] in reading order."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    side = picture.width
    names = {rgb: name for name, rgb in COLORS.items()}
    found = []
    for cell, place in enumerate(ALL_PLACES):
        top, left = (cell // 3) * side / 3, (cell % 3) * side / 3
        pixels = {
            (x, y): names[rgb]
            for y in range(round(top), round(top + side / 3))
            for x in range(round(left), round(left + side / 3))
            if (rgb := picture.getpixel((x, y))) in names
        }
        if not pixels:
            continue
        assert len(set(pixels.values())) == 1, "two colors in one cell"
        xs, ys = [x for x, _ in pixels], [y for _, y in pixels]
        width, height = max(xs) - min(xs) + 1, max(ys) - min(ys) + 1
        found.append({
            "kind": kind_of(pixels, min(xs), min(ys), width, height),
            "color": next(iter(pixels.values())),
            "size": "big" if height > 0.2 * side else "small",
            "place": place,
            "x": (min(xs) + max(xs)) / 2,
            "y": (min(ys) + max(ys)) / 2,
        })
    return found


def kind_of(pixels, left, top, width, height):
    """The shape, from three measures: how full its box is, how much lies in the upper half, whether its middle is empty."""
    full = len(pixels) / (width * height)
    upper = sum(y < top + height / 2 for _, y in pixels) / len(pixels)
    if (left + width // 2, top + height // 2) not in pixels:
        return "ring"
    if full > 0.95:
        return "square"
    if full > 0.72:
        return "circle"  # pi / 4 = 0.79
    if upper < 0.36:
        return "triangle"  # a quarter
    if width < 0.85 * height:
        return "diamond"
    corner = sum((left + dx, top + dy) in pixels for dx in range(width // 4) for dy in range(height // 4))
    if upper > 0.53 and corner:
        return "heart"
    arms = sum((left + dx, top + height // 4) in pixels for dx in range(width)) / width
    return "cross" if 0.25 < arms < 0.4 and full > 0.48 else "star"


def drawn(source):
    """(question, answer, picture as PNG, what the pixels show) of every turn of every row."""
    for row in source.read():
        seen = read(row.images[0])
        for user, assistant in zip(row.messages[::2], row.messages[1::2], strict=True):
            yield user["content"][-1]["text"], assistant["content"][0]["text"], seen


def test_the_same_seed_draws_the_same_and_another_does_not():
    first, again, other = (list(Scenes(pictures=20, side=84, seed=seed).read()) for seed in (0, 0, 1))
    assert [(r.id, r.images, r.messages) for r in first] == [(r.id, r.images, r.messages) for r in again]
    assert all(a.images != b.images for a, b in zip(first, other, strict=True))
    # more pictures leave the first ones as they are
    assert [r.images for r in Scenes(pictures=30, side=84).read()][:20] == [r.images for r in first]


def test_shapes_keep_to_their_cells():
    for number in range(300):
        scene = random_scene(Random(number), SIDE, 1, 9)
        boxes = [item.box for item in scene.items]
        for item, (left, top, right, bottom) in zip(scene.items, boxes, strict=True):
            assert item.column * SIDE / 3 < left and right < (item.column + 1) * SIDE / 3
            assert item.row * SIDE / 3 < top and bottom < (item.row + 1) * SIDE / 3
        assert len({item.place for item in scene.items}) == len(scene.items)
        assert [ALL_PLACES.index(i.place) for i in scene.items] == sorted(ALL_PLACES.index(i.place) for i in scene.items)


def test_pixels_show_what_was_drawn():
    shown = set()
    for number in range(80):
        scene = random_scene(Random(f"pixels/{number}"), SIDE, 1, 6)
        target = io.BytesIO()
        draw(scene).save(target, "PNG")
        wanted = [(i.kind, i.color, i.size, i.place) for i in scene.items]
        assert [(s["kind"], s["color"], s["size"], s["place"]) for s in read(target.getvalue())] == wanted
        shown.update(kind for kind, *_ in wanted)
    assert shown == set(KINDS)


def test_inventories_maps_and_comparisons_are_true():
    asked = set()
    for question, answer, seen in drawn(Shapes(pictures=120, comparisons=0.4)):
        asked.add(question)
        if question == INVENTORY:
            assert answer == "; ".join(f"{s['color']} {s['kind']}: {s['place']}" for s in seen)
            continue
        if question == MAP:
            parts = [re.fullmatch(r"(?:in|on|at) the (.+): (\w+) (\w+)", part).groups() for part in answer.split("; ")]
            assert parts == [(s["place"], s["color"], s["kind"]) for s in seen]
            continue
        axis, sign = {"left": ("x", 1), "right": ("x", -1), "highest": ("y", 1), "lowest": ("y", -1)}[re.findall(r"\w+", question)[-1]]
        outermost = min(seen, key=lambda s: sign * s[axis])
        assert answer == f"{outermost['color']} {outermost['kind']}"
    assert asked == {INVENTORY, MAP, *(question for question, _ in COMPARISONS)}
    assert {question for question, _, _ in drawn(Shapes(pictures=40))} == {INVENTORY, MAP}


def test_captions_and_answers_are_true():
    asked = set()
    for question, answer, seen in drawn(Scenes(pictures=120, turns=6, captions=0.1)):
        words = answer.removesuffix(".")
        first = " ".join(question.rstrip("?.").split()[:2])
        asked.add(first)
        if first in ("Describe the", "What do"):
            parts = re.findall(r"a (\w+) (\w+) (\w+) (?:in|on|at) the ((?:top|bottom)? ?(?:left|right|center)?)(?=,| and|$)", words)
            assert [(size, color, kind, place.strip()) for size, color, kind, place in parts] == [(s["size"], s["color"], s["kind"], s["place"]) for s in seen]
        elif first in ("Name the", "Which shapes", "Which colors"):
            word = "color" if "color" in question else "kind"
            listed = re.sub(r"\ban? ", "", words).replace(" and ", ", ").split(", ")
            assert listed == (list(dict.fromkeys(s["color"] for s in seen)) if word == "color" else [s["kind"] for s in seen])
        elif first == "How many":
            color = question.rstrip("?").split()[-1]
            assert NUMBERS.index(words) == sum(color in ("there", s["color"]) for s in seen)
        elif first == "Is there":
            color, kind = question.rstrip("?").split()[-2:]
            assert words == ("yes" if any((s["color"], s["kind"]) == (color, kind) for s in seen) else "no")
        elif first == "What is":
            place = question.rstrip("?").split(" the ")[1]
            here = [s for s in seen if s["place"] == place]
            assert words.split()[1:] == [here[0]["color"], here[0]["kind"]] if here else words == "nothing"
        else:
            (one,) = [s for s in seen if s["kind"] in question or f"is {s['color']}" in question]
            wanted = {"What color": one["color"], "Which shape": f"the {one['kind']}", "Is the": one["size"]}
            assert words == wanted.get(first) or (first == "Where is" and words.split(" the ")[1] == one["place"])
    assert len(asked) == 12  # QUESTIONS, less the kinds that share their first two words, plus their second wordings
    assert len(QUESTIONS) == 11


def test_shapes_asks_nothing_that_scenes_teaches():
    taught = {question for question, _, _ in drawn(Scenes(pictures=80, turns=8, side=96))}
    assert not taught & {INVENTORY, MAP, *(question for question, _ in COMPARISONS)}


def test_prepared_the_same_in_two_places_and_no_picture_in_two_splits(tmp_path):
    one, two = (make(Shapes(pictures=60, side=84, splits={"validation": 10, "by": "last"}), tmp_path / name) for name in "ab")
    assert one.fingerprint == two.fingerprint
    assert one.splits == {"train": 50, "validation": 10}
    digests = [{sha for row in one.split(name) for sha in row.sha256} for name in ("train", "validation")]
    assert not digests[0] & digests[1]


@pytest.mark.parametrize("keys", [{"pictures": 0}, {"fewest": 3, "most": 2}, {"most": 10}, {"side": 10}, {"side": "big"}])
@pytest.mark.parametrize("source", [Scenes, Shapes])
def test_wrong_keys_are_named(source, keys):
    with pytest.raises(UserError, match="data."):
        source(**keys)
