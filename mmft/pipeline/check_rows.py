"""Find rows that cannot be trained or measured before the first step; refuse or drop those that are too long."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ..collators.answers import AnswerCollator
from ..collators.base import Collator
from ..collators.scan import Problem, Scan, scan
from ..common.errors import UserError
from ..data.selection import MixedRows, Selection, parts_of
from ..evaluation.kept import KeptSet
from ..system.distributed import is_main
from ..training.token_batches import RowSizes
from .context import RunContext
from .prepare import TrainingInputs

if TYPE_CHECKING:
    from ..data.sample import Sample

log = logging.getLogger("mmft")

PROGRESS_FROM = 2000  # rows; fewer take about a second


@dataclass
class CheckedRows:
    """The rows that are used. lengths: tokens of each training row, of its longest sequence. sequences: how many each becomes. dropped:
    (split, row that was left out). sequences_differ: some row becomes several sequences."""

    rows: Sequence[Any]
    held_out: Sequence[Any] | None
    lengths: list[int]
    sequences: list[int]
    dropped: list[tuple[str, Problem]] = field(default_factory=list)
    sequences_differ: bool = False

    @property
    def sizes(self) -> RowSizes:
        """The sizes of the training rows."""
        return RowSizes(self.lengths, self.sequences)


@dataclass
class _Part:
    """The rows of a split of one data set. name: in messages. key: of the data set in the config. drops: rows that are too long."""

    split: str
    name: str
    key: str
    rows: Sequence[Any]
    found: Scan
    drops: bool
    source: str = ""  # of a mix
    trained: bool = False
    compared: bool = False  # its rows are pairs of answers, each a sequence

    @property
    def refused(self) -> bool:
        """Whether a row cannot be used and is not left out."""
        return bool(self.found.refused or self.found.without_loss or self.found.too_long and not self.drops)

    @property
    def left_out(self) -> set[int]:
        """The indices of rows that are too long."""
        return {problem.index for problem in self.found.too_long}


def check_rows(inputs: TrainingInputs, collator: Collator | AnswerCollator, context: RunContext) -> CheckedRows:
    """Measure every row. Raises UserError that lists the rows which cannot be used, with their lengths.

    `data.too_long=drop` (of a mix: of each source) leaves rows out that are longer than collator.max_length; other unusable rows are always
    an error.
    """
    used = {True: inputs.rows} if inputs.held_out is None else {True: inputs.rows, False: inputs.held_out}  # whether they are trained on
    parts = [_part(inputs, trained, source, part, collator, context) for trained, rows in used.items() for source, part in parts_of(rows).items()]
    if bad := [part for part in parts if part.refused]:  # all at once, so that nobody mends the training rows and then learns of the others
        each = "; ".join(f"{part.name}: {part.found.message()}" for part in bad)
        where = f"data={inputs.prepared.manifest['name']}" if bad[0].source else inputs.prepared.path
        raise UserError(f"{where}: {each}; {_advice(bad)}")
    checked = CheckedRows(inputs.rows, inputs.held_out, [], [])
    kept: dict[bool, dict[str, Sequence[Any]]] = {trained: {} for trained in used}
    for part in parts:
        kept[part.trained][part.source] = _usable(part, checked)
    whole = {trained: MixedRows(own) if isinstance(used[trained], MixedRows) else own[""] for trained, own in kept.items()}
    checked.rows, checked.held_out = whole[True], whole.get(False)
    return checked


def _part(inputs: TrainingInputs, trained: bool, source: str, rows: Sequence[Any], collator: Collator | AnswerCollator, context: RunContext) -> _Part:
    data = inputs.settings["data"]["sources"][source] if source else inputs.settings["data"]
    split = "train" if trained else str(inputs.settings["evaluation"]["split"])  # which may be train, too
    found = context.memo.once(inputs.base_key("rows" if isinstance(collator, Collator) else "answers", source, split, len(rows)), partial(_scan, collator, rows))
    name, key = (f"{source}, {split}", f"data.sources.{source}") if source else (split, "data")
    return _Part(split, name, key, rows, found, data.get("too_long", "refuse") == "drop", source, trained, inputs.objective.PREFERENCE)


def _usable(part: _Part, checked: CheckedRows) -> Sequence[Any]:
    """The rows of a part that are used; what was found about them goes to `checked` and the log."""
    rows, found = _without_long(part), part.found
    ids = f"{part.source}/" if part.source else ""
    checked.dropped += [(part.split, replace(problem, row=f"{ids}{problem.row}")) for problem in found.too_long]
    if part.trained:
        left_out = part.left_out
        checked.lengths += [n for i, n in enumerate(found.tokens) if i not in left_out]
        checked.sequences += [n for i, n in enumerate(found.sequences) if i not in left_out]
    checked.sequences_differ |= found.several > 0
    if found.several and not part.compared:
        log.info("%-14s %d of %d rows of %s become several sequences, one for each answer", "rows", found.several, len(rows), part.name)
    if found.ignored_sizes:
        log.info("%-14s %d rows of %s ask for image sizes (min_pixels, max_pixels, resized_height, resized_width) that this model's processor cannot set", "rows", found.ignored_sizes, part.name)
    return rows


def check_kept(inputs: TrainingInputs, collator: Collator, context: RunContext) -> list[tuple[KeptSet, Sequence[Any]]]:
    """The sets of evaluation.keep with the rows that are measured. Raises UserError as `check_rows` does."""
    checked = []
    for kept in inputs.kept:
        found = context.memo.once(inputs.base_key("rows", kept.prepared.fingerprint, kept.split, len(kept.rows)), partial(_scan, collator, kept.rows))
        part = _Part(kept.split, kept.split, f"evaluation.keep.{kept.name}.data", kept.rows, found, kept.too_long == "drop")
        if part.refused:
            raise UserError(f"evaluation.keep={kept.name}: {kept.prepared.path}: {kept.split}: {found.message()}; {_advice([part])}")
        checked.append((kept, _without_long(part)))
    return checked


def _without_long(part: _Part) -> Sequence[Any]:
    """The rows that are not too long. Raises UserError if none is left."""
    rows, left_out, limit = part.rows, part.left_out, part.found.max_length
    if not left_out:
        return rows
    log.info("%-14s %d of %d rows of %s are longer than collator.max_length=%s", "left out", len(left_out), len(rows), part.name, limit)
    if len(left_out) == len(rows):
        raise UserError(f"collator.max_length={limit}: no row of {part.name} is that short; raise the limit")
    return Selection(rows, [i for i in range(len(rows)) if i not in left_out])


def _scan(collator: Collator | AnswerCollator, rows: Sequence[Sample]) -> Scan:
    return scan(collator, rows, progress=is_main() and len(rows) > PROGRESS_FROM)


def _advice(parts: Sequence[_Part]) -> str:
    advice = []
    if keys := list(dict.fromkeys(f"{part.key}.too_long=drop" for part in parts if part.found.too_long and not part.drops)):
        advice.append(f"raise collator.max_length, make images smaller with model.processor.max_pixels, or leave these rows out with {' '.join(keys)}")
    if any(part.found.refused or part.found.without_loss for part in parts):
        advice.append("mend these rows, or take them out of the data set")
    return " and ".join(advice)
