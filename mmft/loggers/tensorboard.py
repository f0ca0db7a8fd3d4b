"""TensorBoard: write scalars, sample pictures and texts to event files in the run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.records import AnswerRecord
from ..reports.pictures import row_pictures
from .base import Board, Logger, grouped, sample_text

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(kw_only=True)
class TensorBoard(Logger):
    """Writes RUN/tensorboard. Pictures are `<tag>/<index>/picture` (all pictures of a row side by side), texts
    `<tag>/<index>/text`, so that the dashboard shows one slider over the steps of a sample.
    """

    picture_size: int = 256
    _writer: Any = field(default=None, init=False, repr=False)

    def open(self, run_dir: Path, name: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"))

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(grouped(name), value, step)

    def write_samples(self, step: int, rows: Sequence[AnswerRecord], tag: str) -> None:
        import numpy

        for place, row in enumerate(rows):
            name = f"{tag}/{row.get('index', place)}"
            opened = [p for p in row_pictures(row, self.picture_size) if p is not None]
            if opened:
                self._writer.add_image(f"{name}/picture", numpy.asarray(side_by_side(opened)), step, dataformats="HWC")
            self._writer.add_text(f"{name}/text", sample_text(row), step)
        self._writer.flush()

    def write_leaderboard(self, board: Board) -> None:
        self._writer.add_text("leaderboard", board.markdown)

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def side_by_side(pictures: Sequence[Image]) -> Image:
    """Several pictures in a row as one, on white."""
    from PIL import Image

    if len(pictures) == 1:
        return pictures[0]
    whole = Image.new("RGB", (sum(p.width for p in pictures) + 4 * (len(pictures) - 1), max(p.height for p in pictures)), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + 4
    return whole
