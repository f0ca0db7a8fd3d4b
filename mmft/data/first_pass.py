"""FirstPass: reads the rows of a source, checks them and their images, and writes the usable ones to one file; memory use does not grow with them."""

from __future__ import annotations

import gc
import hashlib
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..common.errors import UserError
from ..system.console import shows_progress
from . import splits
from .archives import Archives
from .choices import add_choices
from .download import is_url
from .examine import Examiner
from .image_index import RECENT, ImageIndex, ImageRecord
from .regions import UnitWatch, settle_regions
from .row_checks import problem, strip_texts
from .sample import BadRow, PlainRow, Row, has_regions
from .sources.base import Source
from .without import read_ids
from .wording import shorten_words, shown
from .writer import BATCH, Report, RowFile

WINDOW = 64  # rows whose images are decoded at once; limits how many images are in memory


class TooManyBadRows(Exception):
    def __init__(self, name: str, bad: int, rows: int, allowed: float, reasons: str) -> None:
        super().__init__(f"data={name}: {bad} of {rows} rows cannot be used (data.max_bad_share={allowed:g} allows {int(allowed * rows)}){reasons}.")


@contextmanager
def _collecting_seldom() -> Iterator[None]:
    """Rows hold no cycles of references, and looking for some after every 700 new objects takes a tenth of the time."""
    before = gc.get_threshold()
    gc.set_threshold(max(before[0], 50_000), *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _PendingRow(NamedTuple):
    """A row whose images are being decoded. images: of each its record, or its key in the image index. name: the path of a PlainRow's image."""

    row: Row
    images: list[ImageRecord | str]
    name: str


class _UsableRow(NamedTuple):
    row: Row
    images: list[ImageRecord]


@dataclass
class FirstPass:
    """One reading into the temporary `folder`. earlier: see Examiner.

    After `run`: rows, the usable rows; index, their images; report, with the unusable rows; rows_read; row_notes, of the user; left_out, the row numbers of the
    ids of data.without.
    """

    source: Source
    folder: Path
    earlier: dict[str, Path]
    rows_read: int = 0
    row_notes: Counter[str] = field(default_factory=Counter)
    uses_archives: bool = False
    units: UnitWatch = field(default_factory=UnitWatch)
    compared: Counter[str] = field(default_factory=Counter)  # rows with a rejected answer, rows with a bad one

    def __post_init__(self) -> None:
        self.root = self.source.data_root()
        self.archives = Archives(self.root)
        self.examiner = Examiner(self.root, self.source.image_boundary(), self.folder, self.archives, self.source.downloader, self.source.max_pixels, self.earlier,
                                 self.source.near_distance is not None)  # fmt: skip
        self.without = read_ids(self.source.without) if self.source.without is not None else set()
        self.left_out: dict[str, int] = {}  # id of `without` -> its row in rows.arrow
        self.first_id = ""
        self.index = ImageIndex(self.folder / "index.sqlite")
        self.report = Report(self.folder / "report.jsonl")
        self.rows = RowFile(self.folder / "rows.arrow")
        self._pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="mmft-images")
        self._examined: dict[str, Future[ImageRecord]] = {}
        self._known: dict[str, list[ImageRecord]] = {}  # path of the image of a PlainRow -> its record: most rows of a large table show images that others show
        self._first_reasons: list[str] = []
        self._ids: list[str] = []  # of the usable rows of the record batch that is not full yet
        self._usable: list[_UsableRow] = []

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.archives.close()
        self.index.close()
        self.report.close()
        self.rows.close()

    def run(self) -> None:
        """Raises UserError for a source without rows, TooManyBadRows if a larger share of them than data.max_bad_share is unusable."""
        done: list[_UsableRow | BadRow] = []
        with _collecting_seldom():
            for item in self._checked():
                done.append(item)
                if len(done) == BATCH:
                    self._settle(done)
                    done.clear()
        self._settle(done)
        self._write(len(self._usable))
        self.rows.close()
        self._check_bad_share()

    def _checked(self) -> Iterator[_UsableRow | BadRow]:
        """The rows in order, usable or not, while the images of WINDOW rows after them are decoded."""
        from tqdm import tqdm

        pending: deque[_PendingRow | _UsableRow | BadRow] = deque()
        rows = tqdm(self.source.limited_rows(), total=self._expected(), desc=f"preparing {self.source.name}", unit=" rows",
                    delay=3, mininterval=0.5, file=sys.stderr, dynamic_ncols=True, disable=not shows_progress())
        with rows:
            for item in rows:
                self.rows_read += 1
                pending.append(self._start(item))
                if len(pending) >= WINDOW:
                    yield self._finish(pending.popleft())
        while pending:
            yield self._finish(pending.popleft())

    def _expected(self) -> int | None:
        """The number of rows for the progress bar, as far as it is known; it shows the time left."""
        total, limit = self.source.total(), self.source.limit
        return limit if total is None else total if limit is None else min(total, limit)

    def _start(self, item: Row | BadRow) -> _PendingRow | _UsableRow | BadRow:
        """Check a row's texts and start decoding its images."""
        if isinstance(item, BadRow):
            return item
        if item.id is None or not str(item.id).strip():
            item.id = str(self.rows_read)
        if type(item) is PlainRow and (known := self._known_image(item)) is not None:
            return _UsableRow(item, known)
        strip_texts(item)
        reason = problem(item, self.source.text_only) or add_choices(item, self.source.choices)
        if reason is None and item.split is not None and str(item.split).lower() not in splits.ALIASES:
            reason = f"unknown split: {shown(item.split)!r}; use train, validation or test"
        if reason is not None:
            return BadRow(item.where, reason, item.id)
        downloads = self.source.downloader is not None
        # all images of a row have one root: if one must be stored in the prepared set, all are
        archived = bool(self.archives.paths) and any(not isinstance(image, bytes) and self.examiner.archived(image) for image in item.images)
        self.uses_archives = self.uses_archives or archived
        stored = archived or any([self.examiner.place(image) is None if isinstance(image, bytes) else downloads and is_url(image) for image in item.images])
        images = [self._submit(image, stored) for image in item.images]
        name, item.images = str(item.images[0]) if type(item) is PlainRow else "", []
        return _PendingRow(item, images, name)

    def _known_image(self, row: PlainRow) -> list[ImageRecord] | None:
        """The image of a usable row if an earlier row shows it, too; None for a row that must be looked at."""
        if self.source.choices or problem(row) is not None or row.split is not None and row.split.lower() not in splits.ALIASES:
            return None
        return self._known.get(str(row.images[0]))

    def _submit(self, image: str | bytes, stored: bool) -> ImageRecord | str:
        if isinstance(image, bytes) and not stored:
            key = f"path:{self.examiner.place(image)}"
        elif isinstance(image, bytes):
            key = "bytes:" + hashlib.sha256(image).hexdigest()
        else:
            key = ("copy:" if stored else "path:") + (image if is_url(image) else os.path.normpath(image))
        if key in self._examined:
            return key
        record = self.index.get(key)
        if record is not None:
            return record
        self._examined[key] = self._pool.submit(self.examiner.examine, image, stored)
        return key

    def _finish(self, item: _PendingRow | _UsableRow | BadRow) -> _UsableRow | BadRow:
        """A row whose images are decoded, or why it is dropped."""
        if not isinstance(item, _PendingRow):
            return item
        row = item.row
        images = [image if isinstance(image, ImageRecord) else self._record(image) for image in item.images]
        for record in images:
            if record.error:
                return BadRow(row.where, record.error, row.id)
        if type(row) is not PlainRow and has_regions(row.messages):
            sizes = [(r.width, r.height) for r in images]
            reason = settle_regions(row, sizes, self.source.boxes_unit)
            if reason is not None:
                return BadRow(row.where, reason, row.id)
            self.units.see(row, sizes)
        if type(row) is PlainRow:
            if len(self._known) == RECENT:
                self._known.clear()
            self._known[item.name] = images
        return _UsableRow(row, images)

    def _record(self, key: str) -> ImageRecord:
        if key in self._examined:  # of the rows that wait for an image the first one enters it
            return self.index.add(key, self._examined.pop(key).result())
        record = self.index.get(key)
        assert record is not None  # _submit found it there
        return record

    def _settle(self, done: list[_UsableRow | BadRow]) -> None:
        """Give usable rows their ids, write the report's lines in the order of the rows, and write whole record batches."""
        usable = [item for item in done if isinstance(item, _UsableRow)]
        wanted = [str(row.id) for row, _ in usable]
        ids = self.index.unique_ids(wanted)
        quiet = not self.without and ids == wanted
        start = number = self.rows.count + len(self._usable)
        for item in done:
            if isinstance(item, BadRow):
                self._drop(item)
                continue
            if not (quiet and type(item.row) is PlainRow):
                self._note(item.row, ids[number - start], number)
            number += 1
        if usable and not start:
            self.first_id = ids[0]
        self._ids += ids
        self._usable += usable
        while len(self._usable) >= BATCH:
            self._write(BATCH)

    def _note(self, row: Row, id: str, number: int) -> None:
        """What the report and the manifest say of a usable row. number: of the row in rows.arrow."""
        if id != str(row.id):
            self.report.add(row.where, str(row.id), "changed", f"duplicate id: {shown(row.id)} is used before; this row is now {shown(id)}")
        if row.notes:
            self.row_notes.update(row.notes)
        if id in self.without:
            self.left_out[id] = number
        self.compared["rejected"] += row.rejected is not None
        self.compared["bad"] += row.label is False

    def _write(self, count: int) -> None:
        """Write the first `count` of the settled rows as one record batch."""
        if count:
            ids, usable = self._ids[:count], self._usable[:count]
            del self._ids[:count], self._usable[:count]
            given = [-1 if row.split is None else splits.ALIASES[str(row.split).lower()] for row, _ in usable]
            self.rows.add(ids, [row for row, _ in usable], [images for _, images in usable], given)

    def _drop(self, bad: BadRow) -> None:
        bad = BadRow(bad.where, shorten_words(bad.reason), bad.id)
        self.report.add(bad.where, bad.id, "dropped", bad.reason)
        if len(self._first_reasons) < 3:
            self._first_reasons.append(f"{bad.where}: {bad.reason}")

    def _check_bad_share(self) -> None:
        if not self.rows_read:
            raise UserError(f"data={self.source.name}: the source has no rows; check data.path and the files it names")
        bad, allowed = self.report.counts["dropped"], self.source.max_bad_share
        if bad == self.rows_read or bad > allowed * self.rows_read:
            self.report.close()
            raise TooManyBadRows(self.source.name, bad, self.rows_read, allowed, f": {'; '.join(self._first_reasons)}")
