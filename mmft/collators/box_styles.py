"""How model families write boxes and points: in which numbers, in which order, in which text; and how such texts are read.

A style works on numbers as they stand in a text. `numbers` and `pixels` convert them from and to pixels of the image file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..common.errors import UserError, nearest
from ..common.records import Region
from ..data.sample import coordinates

Size = tuple[int, int]  # (width, height) in pixels
Found = tuple[str, list[float]]  # (label, the two or four numbers as they stand in a text, in the order of the style)

AUTO = "auto"
_NUMBER = r"-?\d+(?:\.\d+)?"
_BRACKETS = re.compile(rf"\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*(?:,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*)?\]")


@dataclass(frozen=True)
class BoxStyle:
    """`label [x1, y1, x2, y2]; label [x, y]`: the plain form, and the base of all others.

    steps: the numbers are shares of the image's sides times this; None: pixels of the image as the processor has resized it.
    top: the highest number written (None: no limit but `steps`). digits: after the point. yx: y stands before x. floor: numbers name the
    bin of a coordinate and are read as its middle; otherwise they are rounded.
    """

    steps: float | None = 1000
    top: float | None = None
    digits: int = 0
    yx: bool = False
    floor: bool = False

    # --- numbers ------------------------------------------------------------------------------------------------

    def numbers(self, region: Region, file: Size, resized: Size) -> list[float]:
        """The numbers of a region in the order in which they are written. file: the image's size, resized: that of what the model sees."""
        values = []
        for i, value in enumerate(coordinates(region)):
            scaled = value / file[i % 2] * (resized[i % 2] if self.steps is None else self.steps)
            limit = self.top if self.top is not None else self.steps if self.steps is not None else resized[i % 2]
            values.append(min(float(int(scaled)) if self.floor else round(scaled, self.digits), limit))
        return _swapped(values) if self.yx else values

    def pixels(self, numbers: Sequence[float], file: Size, resized: Size) -> list[float]:
        """The inverse of `numbers`: pixels of the image file, not rounded, cut to the image."""
        values = _swapped(numbers) if self.yx else list(numbers)
        half = 0.5 if self.floor else 0.0
        scaled = [(v + half) * file[i % 2] / (resized[i % 2] if self.steps is None else self.steps) for i, v in enumerate(values)]
        return [min(max(v, 0.0), float(file[i % 2])) for i, v in enumerate(scaled)]

    # --- texts --------------------------------------------------------------------------------------------------

    def ref(self, label: str) -> str:
        """The name of an object in a text."""
        return label

    def box(self, numbers: Sequence[float]) -> str:
        """A box or point in a text."""
        return f"[{', '.join(self.spelled(n) for n in numbers)}]"

    def listing(self, found: Sequence[Found]) -> str:
        """Several objects as the whole answer."""
        return "; ".join(f"{label} {self.box(numbers)}" for label, numbers in found)

    def read(self, text: str) -> list[Found]:
        """The boxes and points in a text, with their labels; [] if it holds none."""
        found, last = [], 0
        for match in _BRACKETS.finditer(text):
            label = re.split(r"[;\n\]]", text[last : match.start()])[-1].strip(" \t:,")
            found.append((label, [float(n) for n in match.groups() if n is not None]))
            last = match.end()
        return found

    def spelled(self, number: float) -> str:
        return f"{number:.{self.digits}f}"


@dataclass(frozen=True)
class Qwen2VLStyle(BoxStyle):
    """Qwen2-VL: `<|object_ref_start|>label<|object_ref_end|><|box_start|>(x1,y1),(x2,y2)<|box_end|>`, numbers from 0 to 999 (its paper, section 2.2)."""

    top: float | None = 999

    def ref(self, label: str) -> str:
        return f"<|object_ref_start|>{label}<|object_ref_end|>"

    def box(self, numbers: Sequence[float]) -> str:
        pairs = [f"({self.spelled(x)},{self.spelled(y)})" for x, y in zip(numbers[::2], numbers[1::2])]
        return f"<|box_start|>{','.join(pairs)}<|box_end|>"

    def listing(self, found: Sequence[Found]) -> str:
        return "".join(self.ref(label) + self.box(numbers) for label, numbers in found)

    def read(self, text: str) -> list[Found]:
        pattern = rf"<\|object_ref_start\|>(.*?)<\|object_ref_end\|>|\(({_NUMBER}),\s*({_NUMBER})\)(?:,\s*\(({_NUMBER}),\s*({_NUMBER})\))?"
        return _after_names(pattern, text)


@dataclass(frozen=True)
class JsonStyle(BoxStyle):
    """Qwen2.5-VL and Qwen3-VL: a fenced JSON list of {"bbox_2d": [x1, y1, x2, y2], "label": ...} or {"point_2d": ...}; in a text `[x1, y1, x2, y2]`."""

    def listing(self, found: Sequence[Found]) -> str:
        items = [f'{{"{"bbox_2d" if len(numbers) == 4 else "point_2d"}": {self.box(numbers)}, "label": {json.dumps(label, ensure_ascii=False)}}}' for label, numbers in found]
        return "```json\n[\n" + ",\n".join(f"\t{item}" for item in items) + "\n]\n```"

    def read(self, text: str) -> list[Found]:
        found: list[Found] = []
        for match in re.finditer(r"\{[^{}]*\}", text):  # object by object, so that a list cut off at the token limit is read, too
            try:
                item = json.loads(match[0])
            except ValueError:
                continue
            values = next((item[k] for k in ("bbox_2d", "bbox", "box_2d", "point_2d", "point") if k in item), None)
            if isinstance(values, list) and len(values) in (2, 4) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
                found.append((str(item.get("label") or ""), [float(v) for v in values]))
        return found or super().read(text)


@dataclass(frozen=True)
class InternVLStyle(BoxStyle):
    """InternVL: `<ref>label</ref><box>[[x1, y1, x2, y2]]</box>` (its documentation, "Grounding / Detection Data")."""

    def ref(self, label: str) -> str:
        return f"<ref>{label}</ref>"

    def box(self, numbers: Sequence[float]) -> str:
        return f"<box>[{super().box(numbers)}]</box>"

    def listing(self, found: Sequence[Found]) -> str:
        return "".join(self.ref(label) + self.box(numbers) for label, numbers in found)

    def read(self, text: str) -> list[Found]:
        return _after_names(rf"<ref>(.*?)</ref>|{_BRACKETS.pattern}", text)


@dataclass(frozen=True)
class LocationStyle(BoxStyle):
    """Location tokens. PaliGemma: `<loc0012>` four times and the label, objects between ` ; `. Florence-2: the label, then `<loc_12>` four times."""

    token: str = "<loc{:04d}>"
    label_first: bool = False
    between: str = " ; "

    def box(self, numbers: Sequence[float]) -> str:
        return "".join(self.token.format(int(n)) for n in numbers)

    def listing(self, found: Sequence[Found]) -> str:
        return self.between.join(f"{label}{self.box(n)}" if self.label_first else f"{self.box(n)} {label}" for label, n in found)

    def read(self, text: str) -> list[Found]:
        tokens, label = r"((?:<loc_?\d+>){4}|(?:<loc_?\d+>){2})", r"([^<>;]*)"
        pattern = f"{label}{tokens}" if self.label_first else f"{tokens}{label}"
        found: list[Found] = []
        for match in re.finditer(pattern, text):
            name, places = (match[1], match[2]) if self.label_first else (match[2], match[1])
            found.append((name.strip(), [float(n) for n in re.findall(r"\d+", places)]))
        return found


def _swapped(values: Sequence[float]) -> list[float]:
    """x, y, x, y as y, x, y, x, and back."""
    return [v for i in range(0, len(values), 2) for v in (values[i + 1], values[i])]


def _after_names(pattern: str, text: str) -> list[Found]:
    """Boxes and points with the name that stands before them; group 1 of the pattern is a name, the others are numbers."""
    label, found = "", []
    for match in re.finditer(pattern, text, re.DOTALL):
        if match[1] is not None:
            label = match[1].strip()
        else:
            found.append((label, [float(n) for n in match.groups()[1:] if n is not None]))
    return found


#: The values of model.boxes. Styles of published models have the name of their `model_type` in config.json; `auto` chooses by it.
STYLES: dict[str, BoxStyle] = {
    "thousandths": BoxStyle(),
    "percent": BoxStyle(steps=100),
    "unit": BoxStyle(steps=1, digits=3),
    "pixels": BoxStyle(steps=None),
    "qwen2_vl": Qwen2VLStyle(),
    "qwen2_5_vl": JsonStyle(steps=None),
    "qwen3_vl": JsonStyle(),
    "internvl": InternVLStyle(),
    "paligemma": LocationStyle(steps=1024, top=1023, yx=True),
    "florence2": LocationStyle(top=999, floor=True, token="<loc_{:d}>", label_first=True, between=""),
}
SAME_AS = {"qwen3_vl_moe": "qwen3_vl", "qwen3_5": "qwen3_vl", "qwen3_5_moe": "qwen3_vl"}


def find_style(name: str, model_type: str) -> BoxStyle | None:
    """The style that model.boxes=`name` means for this type of model; None if `auto` knows none. Raises UserError for an unknown name."""
    if name == AUTO:
        return STYLES.get(SAME_AS.get(model_type, model_type))
    if name not in STYLES:
        raise UserError(f"model.boxes={name}: no such way to write boxes.{nearest(name, STYLES)} There are: {AUTO}, {', '.join(STYLES)}.")
    return STYLES[name]


def check_whole_images(processor: Any) -> None:
    """Raises UserError if a processor crops images: the model would not see all boxes."""
    images = processor.image_processor
    if getattr(images, "do_center_crop", False):
        height, width = images.crop_size["height"], images.crop_size["width"]
        raise UserError("rows hold boxes, but this model's processor crops images (do_center_crop), so the model would not see all boxes; add"
                        f" model.processor.do_center_crop=false 'model.processor.size={{height: {height}, width: {width}}}'")  # fmt: skip


def no_style(model_type: str) -> str:
    """What to tell the user of a model whose way to write boxes is not known."""
    return f"how {model_type} writes boxes is not known; add model.boxes=thousandths (of the image's sides), or another of {', '.join(STYLES)}"
