"""TensorBoard: event files below the run directory, scalars, sample pictures and texts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..reports.pictures import row_pictures
from .base import Logger, grouped, sample_text


@dataclass(kw_only=True)
class TensorBoard(Logger):
    """Writes RUN/tensorboard. Pictures are `<tag>/<index>/picture` (the pictures of a row beside each other), texts
    `<tag>/<index>/text`, so that one sample's steps share a slider."""

    picture_size: int = 256
    _writer: Any = field(default=None, init=False, repr=False)

    def open(self, run_dir: Path, name: str, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def write_scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(grouped(name), value, step)

    def write_samples(self, step: int, rows: list[dict[str, Any]], tag: str) -> None:
        import numpy

        for place, row in enumerate(rows):
            name = f"{tag}/{row.get('index', place)}"
            opened = [p for p in row_pictures(row, self.picture_size) if p is not None]
            if opened:
                self._writer.add_image(f"{name}/picture", numpy.asarray(side_by_side(opened)), step, dataformats="HWC")
            self._writer.add_text(f"{name}/text", sample_text(row), step)
        self._writer.flush()

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def side_by_side(pictures: list[Any]):
    """One picture of several, on white."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    whole = Image.new("RGB", (sum(p.width for p in pictures) + 4 * (len(pictures) - 1), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + 4
    return whole
