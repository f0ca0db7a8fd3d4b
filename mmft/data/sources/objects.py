"""Convert the objects of a row (boxes and points with labels) in all common formats, and put them where the texts name them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ...common.records import Region
from ..sample import Message, Part, message_text, text_part
from ..wording import shown
from .cells import UnusableRow, is_nan, structure_in_text, texts

FORMS = ("xyxy", "xywh")  # the four numbers of a box: two corners, or left, top, width, height
BOX, REF = "<bbox>", "<ref-object>"  # ms-swift's placeholders in texts
_PLACES = re.compile(f"({BOX}|{REF})")
_LABELS = ("label", "category", "category_name", "name", "ref", "class", "text")
_COORDINATES = ("box", "bbox", "bbox_2d", "box_2d", "point", "point_2d")
_MANY_LABELS = ("ref", "labels", "label", "categories", "category", "names")
_MANY_BOXES = ("bbox", "boxes", "bboxes", "box", "points", "point")


@dataclass
class Objects:
    """regions: boxes as two corners, and points. refs: the texts for `<ref-object>`, in order. unit: see mmft/data/regions.py; None: the source's."""

    regions: list[Region] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    unit: str | None = None

    def __bool__(self) -> bool:
        return bool(self.regions)

    def named(self, labels: Sequence[str]) -> Objects:
        """A copy; boxes without a label get the first of `labels`, which also are the texts for `<ref-object>`."""
        regions: list[Region] = [{**r, "label": r["label"] or (labels[0] if labels else "")} for r in self.regions]
        return Objects(regions, list(labels) or list(self.refs), self.unit)


def read_objects(value: Any, form: str = "xyxy") -> Objects:
    """The objects of a row. form: see FORMS. Raises UnusableRow.

    A list of {label, box | point, image}; one box; a list of boxes; or lists under keys, as ms-swift's {ref, bbox, bbox_type, image_id}
    and the {bbox, categories} of detection sets. A text that holds one of these as JSON is read, too.
    """
    value = structure_in_text(value)
    if value is None or is_nan(value) or value == "":
        return Objects()
    if isinstance(value, Mapping):
        key = next((k for k in _MANY_BOXES if isinstance(value.get(k), (list, tuple)) and (not value[k] or isinstance(value[k][0], (list, tuple)))), None)
        return _lists(value, key, form) if key is not None else _labelled([value], form)
    if not isinstance(value, (list, tuple)):
        raise UnusableRow(f"not a box: {shown(value)} is not a list of objects")
    if value and all(isinstance(v, Mapping) for v in value):
        return _labelled(value, form)
    if value and isinstance(value[0], (list, tuple)):
        return Objects([_region(numbers, "", form) for numbers in value])
    return Objects([_region(value, "", form)] if value else [])


def _labelled(objects: Sequence[Mapping[str, Any]], form: str) -> Objects:
    regions = []
    for item in objects:
        key = next((k for k in _COORDINATES if item.get(k) is not None), None)
        if key is None:
            raise UnusableRow(f"not a box: an object has no {' or '.join(_COORDINATES[:2])} or point; it has {shown(', '.join(map(str, item)))}")
        label = next((item[k] for k in _LABELS if item.get(k) is not None), "")
        regions.append(_region(item[key], _label(label), form, item.get("image", 0)))
    return Objects(regions, [r["label"] for r in regions])


def _lists(value: Mapping[str, Any], key: str, form: str) -> Objects:
    """Objects as lists under keys; a single label belongs to all boxes."""
    boxes = value[key]
    given = next((value[k] for k in _MANY_LABELS if isinstance(value.get(k), (list, tuple))), ())
    refs = [_label(label) for label in given]
    labels = refs if len(refs) == len(boxes) else refs * len(boxes) if len(refs) == 1 else [""] * len(boxes)
    images = value.get("image_id") or [0] * len(boxes)
    if not isinstance(images, (list, tuple)) or len(images) != len(boxes):
        raise UnusableRow(f"not a box: image_id has {shown(images)} for {len(boxes)} boxes")
    kind = value.get("bbox_type", "real")
    if kind not in ("real", "norm1", None):
        raise UnusableRow(f"not a box: bbox_type={shown(kind)}; it must be real or norm1")
    form = "xyxy" if "ref" in value or "bbox_type" in value else form  # ms-swift's boxes are always corners
    regions = [_region(numbers, label, form, image) for numbers, label, image in zip(boxes, labels, images)]
    return Objects(regions, refs, "unit" if kind == "norm1" else None)


def _label(value: Any) -> str:
    found = texts(value, "a label")
    return found[0] if found else ""


def _region(numbers: Any, label: str, form: str, image: Any = 0) -> Region:
    values = list(numbers) if isinstance(numbers, (list, tuple)) else None
    if values is None or len(values) not in (2, 4) or any(isinstance(v, bool) or not isinstance(v, (int, float)) or v - v != 0 for v in values):
        raise UnusableRow(f"not a box: {shown(numbers)}; a box is a list of four numbers, a point of two")
    if isinstance(image, bool) or not isinstance(image, int):
        raise UnusableRow(f"not a box: image={shown(image)}; it must be the number of an image of the row, from 0")
    if len(values) == 2:
        return {"label": label, "image": image, "point": [float(v) for v in values]}
    left, top, right, bottom = map(float, values)
    if form == "xywh":
        right, bottom = left + right, top + bottom
    if right <= left or bottom <= top:
        way = "is read as left, top, right, bottom and has no area; data.boxes=xywh reads left, top, width, height" if form == "xyxy" else "has no area"
        raise UnusableRow(f"box order: {shown(numbers)} {way}")
    return {"label": label, "image": image, "box": [left, top, right, bottom]}


def place_objects(messages: list[Message], objects: Objects) -> None:
    """Replace `<bbox>` and `<ref-object>` in the texts by the objects, in order; without `<bbox>`, an empty or missing answer becomes the list of all.

    Raises UnusableRow if the numbers of places and objects differ, or if an object of a list has no label.
    """
    if not objects:
        return
    count = sum(part["text"].count(BOX) for m in messages for part in m["content"] if part["type"] == "text")
    if count and count != len(objects.regions):
        raise UnusableRow(f"box count: {count} {BOX} in the texts, {len(objects.regions)} boxes; write {BOX} once for each box")
    regions, refs = iter(objects.regions), iter(objects.refs)
    for message in messages:
        message["content"] = [piece for part in message["content"] for piece in (_placed(part["text"], regions, refs) if part["type"] == "text" else [part])]
    if count:
        return
    answered = bool(messages) and messages[-1]["role"] == "assistant"
    if answered and message_text(messages[-1]).strip():
        raise UnusableRow(f"box count: no {BOX} in the texts, {len(objects.regions)} boxes; write {BOX} once for each box, or leave the answer out to"
                          " train their list")  # fmt: skip
    unnamed = next((r for r in objects.regions if not r["label"]), None)
    if unnamed is not None:
        raise UnusableRow(f"box without label: {unnamed.get('box', unnamed.get('point'))} has none, and the answer is the list of all objects")
    if not answered:
        messages.append({"role": "assistant", "content": []})
    messages[-1]["content"] = [{"type": "regions", "regions": objects.regions}]


def _placed(text: str, regions: Any, refs: Any) -> list[Part]:
    parts: list[Part] = []
    for piece in _PLACES.split(text):
        if piece == BOX:
            parts.append({"type": "box", "region": next(regions)})
        elif piece == REF:
            name = next(refs, None)
            if name is None:
                raise UnusableRow(f"box count: more {REF} in the texts than labels")
            parts.append({"type": "ref", "text": name})
        elif piece:
            parts.append(text_part(piece))
    return parts
