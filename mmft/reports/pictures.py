"""Small pictures of evaluation rows for pages and loggers."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from ..common.records import AnswerRecord

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 150  # pixels; smaller pictures are shown enlarged, with hard edges


class ShownPicture(TypedDict):
    """name: path below the row's root. uri: `data:` address, None if the file cannot be opened. small: see SMALL."""

    name: str
    uri: str | None
    small: bool


class ShownPictures(TypedDict):
    """more: number of pictures of the row that are not shown."""

    pictures: list[ShownPicture]
    more: int


def open_small(root: str, image: str, side: int) -> Image | None:
    """The picture at root/image, RGB, at most `side` pixels wide and high; None when it cannot be opened."""
    from ..data.images import open_image

    try:
        picture = open_image(Path(root) / image)
        picture.thumbnail((side, side))
        return picture
    except Exception:  # a report or a logger must not fail: preparing the data already named broken images
        return None


def row_pictures(row: AnswerRecord, side: int) -> list[Image | None]:
    """One small picture (or None) for each image of an evaluation row, in order."""
    return [open_small(row.get("root") or "", image, side) for image in row.get("images") or ()]


def shown_pictures(row: AnswerRecord, side: int, limit: int) -> ShownPictures:
    """The first `limit` pictures of a row as the pages' templates take them."""
    names = [str(i) for i in row.get("images") or ()]
    opened = [open_small(row.get("root") or "", name, side) for name in names[:limit]]
    return {
        "pictures": [
            {"name": name, "uri": data_uri(small) if small else None, "small": small is not None and max(small.size) < SMALL}
            for name, small in zip(names[:limit], opened, strict=True)
        ],
        "more": max(0, len(names) - limit),
    }


def data_uri(picture: Image) -> str:
    """A picture as a `data:` address for a page that is one file: JPEG, or PNG below SMALL pixels, where JPEG artefacts show."""
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) < SMALL else "jpeg"
    picture.save(buffer, format=kind, optimize=True, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
