"""Find rows that cannot be trained or measured before the first step; refuse or drop those that are too long."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..collators.base import Collator
from ..collators.scan import Problem, Scan, scan
from ..common.errors import UserError
from ..data.selection import Selection
from ..evaluation.kept import KeptSet
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
    splits: dict[str, Sequence[Any]] = {"train": inputs.rows}
    if inputs.held_out is not None:
        splits[str(inputs.settings["evaluation"]["split"])] = inputs.held_out
    scans = {split: context.memo.once(inputs.base_key("rows", split, len(rows)), partial(_scan, collator, rows)) for split, rows in splits.items()}
    bad = {split: found for split, found in scans.items() if any(mode != "drop" or p not in found.too_long for p in found.unusable)}
    if bad:  # of all splits at once, so that nobody mends the training rows and then learns of the others
        each = "; ".join(f"{split}: {found.message()}" for split, found in bad.items())
        raise UserError(f"{inputs.prepared.path}: {each}; {_advice(bad.values(), mode)}")
    checked = CheckedRows(inputs.rows, inputs.held_out, [])
    for split, found in scans.items():
        rows, left_out = _without_long(found, splits[split], split)
        checked.dropped += [(split, problem) for problem in found.too_long]
        if split == "train":
            checked.rows = rows
            checked.lengths = [n for i, n in enumerate(found.tokens) if i not in left_out]
        else:
            checked.held_out = rows
        checked.sequences_differ |= found.several > 0
        if found.several:
            log.info("%-14s %d of %d rows of %s become several sequences, one for each answer", "rows", found.several, len(rows), split)
        if found.ignored_sizes:
            log.info("%-14s %d rows of %s ask for image sizes (min_pixels, max_pixels, resized_height, resized_width) that this model's processor cannot set", "rows", found.ignored_sizes, split)
    return checked


def check_kept(inputs: TrainingInputs, collator: Collator, context: RunContext) -> list[tuple[KeptSet, Sequence[Any]]]:
    """The sets of evaluation.keep with the rows that are measured. Raises UserError as `check_rows` does."""
    checked = []
    for kept in inputs.kept:
        found = context.memo.once(inputs.base_key("rows", kept.prepared.fingerprint, kept.split, len(kept.rows)), partial(_scan, collator, kept.rows))
        if any(kept.too_long != "drop" or p not in found.too_long for p in found.unusable):
            raise UserError(f"evaluation.keep={kept.name}: {kept.prepared.path}: {kept.split}: {found.message()}; {_advice([found], kept.too_long, f'evaluation.keep.{kept.name}.data.too_long')}")
        checked.append((kept, _without_long(found, kept.rows, kept.split)[0]))
    return checked


def _without_long(found: Scan, rows: Sequence[Any], split: str) -> tuple[Sequence[Any], set[int]]:
    """(the rows that are not too long, the positions of the others). Raises UserError if none is left."""
    left_out = {problem.index for problem in found.too_long}
    if not left_out:
        return rows, left_out
    log.info("%-14s %d of %d rows of %s are longer than collator.max_length=%s", "left out", len(left_out), len(rows), split, found.max_length)
    if len(left_out) == len(rows):
        raise UserError(f"collator.max_length={found.max_length}: no row of {split} is that short; raise the limit")
    return Selection(rows, [i for i in range(len(rows)) if i not in left_out]), left_out


def _scan(collator: Collator, rows: Sequence[Sample]) -> Scan:
    return scan(collator, rows, progress=is_main() and len(rows) > PROGRESS_FROM)


def _advice(scans: Iterable[Scan], mode: str, key: str = "data.too_long") -> str:
    found, advice = list(scans), []
    if mode != "drop" and any(scan.too_long for scan in found):
        advice.append(f"raise collator.max_length, make images smaller with model.processor.max_pixels, or leave these rows out with {key}=drop")
    if any(scan.refused or scan.without_loss for scan in found):
        advice.append("mend these rows, or take them out of the data set")
    return " and ".join(advice)
