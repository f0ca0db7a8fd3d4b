"""Sizes of the images of a row, from the headers of their files."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from ..data.images import inside

if TYPE_CHECKING:
    from ..data.sample import Sample

ROTATED = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def image_file_sizes(sample: Sample) -> list[tuple[int, int]]:
    """(width, height) of each image as it will be opened, from the headers of the files. Raises ImageError."""
    from PIL import Image

    sizes = []
    try:
        for path in sample.image_paths:
            place = inside(path)
            with Image.open(path if place is None else io.BytesIO(place.read())) as image:
                width, height = image.size
                sizes.append((height, width) if image.getexif().get(0x0112) in ROTATED else (width, height))
    except Exception:  # whatever is wrong with a file, opening it in full says it better
        return [image.size for image in sample.load_images()]
    return sizes
