"""Find rows that cannot be trained or measured before the first step; refuse or drop those that are too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..collators.base import Collator
from ..collators.scan import Problem, Scan, scan
from ..common.errors import UserError
from ..data.selection import Selection
from ..system.distributed import is_main
from .context import RunContext
from .prepare import TrainingInputs

if TYPE_CHECKING:
    from ..data.sample import Sample

log = logging.getLogger("mmft")

PROGRESS_FROM = 2000  # rows; fewer take about a second


@dataclass
class CheckedRows:
    """The rows that are used. lengths: tokens of each training row. dropped: (split, row that was left out). sequences_differ: some
    row becomes several sequences."""

    rows: Sequence[Any]
    held_out: Sequence[Any] | None
    lengths: list[int]
    dropped: list[tuple[str, Problem]] = field(default_factory=list)
    sequences_differ: bool = False


def check_rows(inputs: TrainingInputs, collator: Collator, context: RunContext) -> CheckedRows:
    """Measure every row. Raises UserError that lists the rows which cannot be used, with their lengths.

    `data.too_long=drop` leaves rows out that are longer than collator.max_length; other unusable rows are always an error.
    """
    mode = inputs.settings["data"].get("too_long", "refuse")
    name = inputs.settings["evaluation"]["split"]
    checked = CheckedRows(inputs.rows, inputs.held_out, [])
    splits: list[tuple[str, Sequence[Any] | None]] = [("train", inputs.rows), (str(name), inputs.held_out)]
    for split, rows in splits:
        if rows is None:
            continue
        found = context.memo.once(inputs.base_key("rows", split, len(rows)), partial(_scan, collator, rows))
        if found.too_long and mode == "drop":
            checked.dropped += [(split, problem) for problem in found.too_long]
            left_out = {problem.index for problem in found.too_long}
            kept: Sequence[Any] = Selection(rows, [i for i in range(len(rows)) if i not in left_out])
            log.info("%-14s %d of %d rows of %s are longer than collator.max_length=%s", "left out", len(left_out), len(rows), split, collator.max_length)
            if not len(kept):
                raise UserError(f"collator.max_length={collator.max_length}: no row of {split} is that short; raise the limit")
        else:
            kept, left_out = rows, set()
        problems = [p for p in found.unusable if p not in found.too_long or mode != "drop"]
        if problems:
            raise UserError(f"{inputs.prepared.path}: {split}: {_message(found, mode)}")
        if split == "train":
            checked.rows = kept
            checked.lengths = [n for i, n in enumerate(found.tokens) if i not in left_out]
        else:
            checked.held_out = kept
        checked.sequences_differ |= found.several > 0
        if found.several:
            log.info("%-14s %d of %d rows of %s become several sequences, one for each answer", "rows", found.several, len(rows), split)
        if found.ignored_sizes:
            log.info("%-14s %d rows of %s ask for image sizes (min_pixels, max_pixels, resized_height, resized_width) that this model's processor cannot set", "rows", found.ignored_sizes, split)
    return checked


def _scan(collator: Collator, rows: Sequence[Sample]) -> Scan:
    return scan(collator, rows, progress=is_main() and len(rows) > PROGRESS_FROM)


def _message(found: Scan, mode: str) -> str:
    advice = []
    if found.too_long and mode != "drop":
        advice.append("raise collator.max_length, make images smaller with model.processor.max_pixels, or leave these rows out with data.too_long=drop")
    if found.refused or found.without_loss:
        advice.append("mend these rows, or take them out of the data set")
    return f"{found.message()}; {' and '.join(advice)}"
