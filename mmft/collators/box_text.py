"""Write the boxes of a row as a model family writes them, and turn those of a generated text into boxes in pixels of the image file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..common.records import Region
from ..data.sample import Message, Part, Sample
from .box_styles import BoxStyle, Found, Size


def write_boxes(sample: Sample, style: BoxStyle, sizes: Sequence[Size], resized: Sequence[Size]) -> Sample:
    """The sample with its boxes and points as texts. sizes, resized: of its images, in the files and as the model sees them."""

    def written(region: Region) -> Found:
        return region["label"], style.numbers(region, sizes[region["image"]], resized[region["image"]])

    def part(one: Part) -> Part:
        if one["type"] == "ref":
            return {"type": "text", "text": style.ref(one["text"]), "tokens": True}
        if one["type"] == "box":
            return {"type": "text", "text": style.box(written(one["region"])[1]), "tokens": True}
        if one["type"] == "regions":
            return {"type": "text", "text": style.listing([written(r) for r in one["regions"]]), "tokens": True}
        return one

    messages: list[Message] = [{**m, "content": _joined([part(one) for one in m["content"]], m["role"])} for m in sample.messages]
    result = Sample(sample.id, sample.images, messages, sample.references, sample.root, sample.sha256, sample.max_pixels, sample.source, sample.choices)
    # other references have their boxes in pixels of the file, which is not how this model writes them
    return replace(result, references=(result.answer_text,)) if sample.regions else result


def regions_of(found: Sequence[Found], sample: Sample, style: BoxStyle, sizes: Sequence[Size], resized: Sequence[Size]) -> list[Region]:
    """What `style.read` found in an answer to `sample`, in pixels of its image files.

    In a row of several images it belongs to the one of the row's own boxes, or to the first.
    """
    own = {region["image"] for region in sample.regions}
    image = own.pop() if len(own) == 1 else 0
    regions: list[Region] = []
    for label, numbers in found:
        region: Region = {"label": label, "image": image}
        region["box" if len(numbers) == 4 else "point"] = [round(v, 2) for v in style.pixels(numbers, sizes[image], resized[image])]
        regions.append(region)
    return regions


def _joined(parts: Sequence[Part], role: str) -> list[Part]:
    """The parts with neighbouring texts of an answer joined: some chat templates write only the first text of an answer."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if role == "assistant" and last is not None and last["type"] == "text" and part["type"] == "text":
            joined[-1] = {"type": "text", "text": last["text"] + part["text"]}
        else:
            joined.append(part)
    return joined
