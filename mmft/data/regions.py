"""Boxes and points of a row: bring them to pixels of their image and say what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..common.records import Region
from .sample import Row, coordinates, has_regions, message_text, regions_of
from .wording import shown

UNITS = {"pixels": 0, "thousandths": 1000, "unit": 1}  # what the numbers of rows mean: pixels, or shares of the image's sides times this
SLACK = 1.0  # pixels that a box may reach beyond its image, by rounding; it is cut off
ENOUGH = 4  # boxes in large images before the warning about another unit


def row_regions(row: Row) -> Iterator[Region]:
    for message in row.messages:
        yield from regions_of(message["content"])


def settle_regions(row: Row, sizes: Sequence[tuple[int, int]], unit: str) -> str | None:
    """Turn the boxes of a row into pixels, cut to their images; or return why that cannot be done.

    sizes: (width, height) of each image of the row. unit: see UNITS; that of the row itself comes first.
    """
    if not has_regions(row.messages):
        return None
    answer = message_text(row.messages[-1])
    for region in row_regions(row):
        if not 0 <= region["image"] < len(sizes):
            return f"box without image: {_name(region)} is in image {region['image']} of {len(sizes)} (counted from 0)"
        reason = _settle(region, *sizes[region["image"]], row.boxes_unit or unit)
        if reason is not None:
            return reason
    written = message_text(row.messages[-1])
    row.references = [written if text == answer else text for text in row.references]
    return None


def _settle(region: Region, width: int, height: int, unit: str) -> str | None:
    steps, limits = UNITS[unit], (float(width), float(height))
    values = [value * limits[i % 2] / steps if steps else value for i, value in enumerate(coordinates(region))]
    # three decimals: whole numbers stay short in texts
    inside = [round(min(max(value, 0.0), limits[i % 2]), 3) for i, value in enumerate(values)]
    if any(abs(a - b) > SLACK + 0.001 for a, b in zip(values, inside)) or len(inside) == 4 and (inside[2] <= inside[0] or inside[3] <= inside[1]):
        return f"box outside image: {_name(region)} is not inside the image of {width} x {height} pixels"
    region["box" if len(values) == 4 else "point"] = inside
    return None


def _name(region: Region) -> str:
    numbers = ", ".join(f"{v:g}" for v in coordinates(region))
    return shown(f"{region['label']} [{numbers}]".strip())


@dataclass
class UnitWatch:
    """Notices sets whose boxes seem to be in another unit than pixels. large: boxes in images wider or higher than 1000 pixels."""

    rows: int = 0
    boxes: int = 0
    large: int = 0
    above_1000: int = 0
    above_1: int = 0

    def see(self, row: Row, sizes: Sequence[tuple[int, int]]) -> None:
        if not has_regions(row.messages):
            return
        found = list(row_regions(row))
        self.rows += 1
        self.boxes += len(found)
        for region in found:
            highest = max(coordinates(region))
            self.above_1 += highest > 1
            if max(sizes[region["image"]]) > 1000:
                self.large += 1
                self.above_1000 += highest > 1000

    def note(self) -> str | None:
        """One line for the user if the numbers look like thousandths or shares of the image."""
        if self.boxes and not self.above_1:
            return f"no number of the {self.boxes} boxes is above 1: if they are shares of the image's sides, and not pixels, add data.boxes_unit=unit"
        if self.large >= ENOUGH and not self.above_1000:
            return (f"no number of the {self.large} boxes in images larger than 1000 pixels is above 1000: if they are thousandths of the image's sides,"
                    " and not pixels of the image file, add data.boxes_unit=thousandths")  # fmt: skip
        return None
