"""The pictures of evaluation rows, small; shared by the page and the loggers."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

SMALL = 150  # pixels; shown enlarged, with hard edges


def open_small(root: str, image: str, side: int):
    """The picture at root/image, RGB, at most `side` pixels wide and high; None when it cannot be opened."""
    from ..data.images import open_image

    try:
        picture = open_image(Path(root) / image)
        picture.thumbnail((side, side))
        return picture
    except Exception:  # a report or a logger shows what there is; the data's faults were named when it was prepared
        return None


def row_pictures(row: dict[str, Any], side: int) -> list[Any]:
    """One small picture (or None) for each image of an evaluation row, in order."""
    return [open_small(row.get("root") or "", image, side) for image in row.get("images") or ()]


def data_uri(picture) -> str:
    """A picture as a `data:` address, for a page that is one file: a JPEG, or a PNG where it is so small that JPEG's noise shows."""
    buffer = io.BytesIO()
    kind = "png" if max(picture.size) < SMALL else "jpeg"
    picture.save(buffer, format=kind, optimize=True, **({"quality": 80} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
