"""Small pictures of evaluation rows for pages and loggers."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..common.records import AnswerRecord, Region
from ..data.sample import coordinates

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 150  # pixels; smaller pictures are shown enlarged, with hard edges


class ShownPicture(TypedDict):
    """name: path below the row's root. uri: `data:` address, None if the file cannot be opened. small: see SMALL. overlay: see `overlay`."""

    name: str
    uri: str | None
    small: bool
    overlay: str


class ShownPictures(TypedDict):
    """more: number of pictures of the row that are not shown. marked: (kind, name) of what is drawn over them."""

    pictures: list[ShownPicture]
    more: int
    marked: list[tuple[str, str]]


Marked = tuple[str, str, Sequence[Region]]  # (kind: reference, base, tuned or other; name; boxes and points)


def open_small(root: str, image: str, side: int) -> Image | None:
    """The picture at root/image, RGB, at most `side` pixels wide and high; None when it cannot be opened."""
    opened = _open(root, image, side)
    return opened[0] if opened else None


def _open(root: str, image: str, side: int) -> tuple[Image, tuple[int, int]] | None:
    """(the small picture, the size of the image file)"""
    from ..data.images import open_image

    try:
        picture = open_image(Path(root) / image)
        size = picture.size
        picture.thumbnail((side, side))
        return picture, size
    except Exception:  # a report or a logger must not fail: preparing the data already named broken images
        return None


def row_pictures(row: AnswerRecord, side: int) -> list[Image | None]:
    """One small picture (or None) for each image of an evaluation row, in order."""
    return [open_small(row.get("root") or "", image, side) for image in row.get("images") or ()]


def shown_pictures(row: AnswerRecord, side: int, limit: int, answers: Sequence[Marked] = ()) -> ShownPictures:
    """The first `limit` pictures of a row as the pages' templates take them, with the boxes of its reference and of `answers`."""
    drawn = [one for one in (("reference", "reference", row.get("reference_boxes") or []), *answers) if one[2]]
    names = [str(i) for i in row.get("images") or ()]
    pictures = [_shown(row.get("root") or "", name, side, number, drawn) for number, name in enumerate(names[:limit])]
    return {"pictures": pictures, "more": max(0, len(names) - limit), "marked": [(kind, name) for kind, name, _ in drawn]}


def boxes_of(kind: str, name: str, answer: AnswerRecord | None) -> Marked:
    """The boxes of an answer, to be drawn."""
    return kind, name, (answer.get("boxes") or []) if answer else []


def _shown(root: str, name: str, side: int, number: int, drawn: Sequence[Marked]) -> ShownPicture:
    opened = _open(root, name, side)
    if opened is None:
        return {"name": name, "uri": None, "small": False, "overlay": ""}
    small, size = opened
    return {"name": name, "uri": data_uri(small), "small": max(small.size) < SMALL, "overlay": overlay(size, number, drawn)}


def overlay(size: tuple[int, int], image: int, drawn: Sequence[Marked]) -> str:
    """SVG with the boxes and points that `drawn` has in an image of a row, "" for none; it is laid over the picture.

    size: of the image file, whose pixels the boxes count. image: its number in the row.
    """
    shapes = "".join(_shape(kind, name, region) for kind, name, regions in drawn for region in regions if region.get("image", 0) == image)
    return f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="boxes">{shapes}</svg>' if shapes else ""


def _shape(kind: str, name: str, region: Region) -> str:
    """A region as an SVG element; a box whose corners are in the wrong order is drawn as the box between them."""
    values = coordinates(region)
    title = escape(" ".join(f"{name}: {region['label']} [{', '.join(f'{v:g}' for v in values)}]".split()))
    if len(values) == 2:
        return f'<path class="{kind}" d="M{values[0]} {values[1]}h0"><title>{title}</title></path>'
    (left, right), (top, bottom) = sorted(values[::2]), sorted(values[1::2])
    return f'<rect class="{kind}" x="{left}" y="{top}" width="{right - left:g}" height="{bottom - top:g}"><title>{title}</title></rect>'


def data_uri(picture: Image) -> str:
    """A picture as a `data:` address for a page that is one file: JPEG, or PNG below SMALL pixels, where JPEG artefacts show."""
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) < SMALL else "jpeg"
    picture.save(buffer, format=kind, optimize=True, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
