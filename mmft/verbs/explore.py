"""`mmft explore data=...`: what is in a data set, as a page and on one screen: sizes, answers, languages, pictures, duplicates, rows left out."""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from ..common.errors import UserError
from ..data.prepare import prepared_data
from ..runs.directory import plain_name

if TYPE_CHECKING:
    from ..audit.survey import Survey

log = logging.getLogger("mmft")


@dataclass
class Explore:
    """The keys of conf/task/explore.yaml."""

    pictures: int = 24
    out: str | None = None

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> Survey:
        """Print and write the survey of the configured data set. Unusable rows are counted, however many there are. Raises UserError."""
        from ..audit.survey import survey
        from ..audit.survey_page import summary_tables, write_page
        from ..reports import terminal

        if isinstance(self.pictures, bool) or self.pictures < 0:
            raise UserError(f"pictures={self.pictures}: must be a number of images of each source and split, 0 or more")
        if self.out and Path(self.out).exists():
            raise UserError(f"out={self.out}: exists already; choose another name, or remove it")
        prepared = prepared_data(cfg, any_bad_share=True)
        found = survey(prepared)
        target = Path(self.out) if self.out else _page(Path(cfg.output_dir), found.name)
        write_page(target, found, [w.removeprefix("task.") for w in overrides if w != "task=explore"], self.pictures)
        terminal.show(*summary_tables(found))
        log.info("\npage           %s", target)
        return found


def _page(output_dir: Path, name: str) -> Path:
    return output_dir / f"explore_{datetime.datetime.now():%Y-%m-%d_%H-%M-%S}_{plain_name(name)}.html"
