"""prepare: checks the rows of a source, assigns them to splits and writes a prepared data set, with flat memory use."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sqlite3
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.errors import UserError
from ..system.console import shows_progress
from . import splits
from .archives import Archives
from .choices import add_choices
from .download import is_url
from .examine import Examiner
from .image_index import ImageIndex, ImageRecord
from .mix import Mix
from .near import NearDuplicates, near_duplicates
from .prepared import FORMAT, NEAR, AlikeImage, AlikePair, Manifest, PreparedData
from .regions import UnitWatch, settle_regions
from .row_checks import problem, strip_texts
from .sample import BadRow, Row
from .sources.base import Settings, Source, Stamp
from .staleness import archive_states, earlier_downloads, stale, write_unusable
from .without import KEY as WITHOUT
from .without import read_ids
from .wording import shorten_words, shown
from .writer import Report, RowFile, collect_references, divide

if TYPE_CHECKING:
    from omegaconf import DictConfig

WINDOW = 64  # rows whose images are decoded at once; limits how many images are in memory


def prepare(source: Source, out_root: str | Path, download: bool = False) -> PreparedData:
    """The prepared data set of `source` below `out_root`; an existing one with the same key is used again.

    A source that downloads images is prepared only if `download` is true, which is so for the verb prepare alone.

    Raises UserError if files or columns are missing, too many rows are unusable, a split would be empty, or writing fails.
    No partial output remains; if too many rows are unusable, they are listed in `<name>-<key>.report.jsonl`.
    """
    from filelock import FileLock, Timeout

    out_root = Path(out_root).resolve()
    settings, stamp = source.settings(), source.stamp()
    content = {k: v for k, v in settings.items() if k != "max_bad_share"}  # max_bad_share changes no row
    key = hashlib.sha256(json.dumps([FORMAT, content, stamp], sort_keys=True, default=str).encode()).hexdigest()[:12]
    final = out_root / f"{source.name}-{key}"
    with _write_errors(out_root):
        out_root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out_root / f".{final.name}.lock")  # released by the system when its process ends
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"mmft: another process is preparing {final.name}; waiting for it", file=sys.stderr)
            lock.acquire()
        try:
            return _prepare(source, settings, stamp, key, final, download)
        finally:
            lock.release()


def _prepare(source: Source, settings: Settings, stamp: Stamp, key: str, final: Path, download: bool) -> PreparedData:
    earlier: dict[str, Path] = {}
    if final.is_dir():
        existing = PreparedData(final)
        reason = stale(existing, download and source.downloader is not None)
        if reason is None:
            _check_share(existing, source.max_bad_share)
            return existing
        if source.downloader is not None and not download:
            raise UserError(f"{final.name}: {reason}; run `mmft prepare` with the same data=... words, which alone downloads images")
        print(f"mmft: {final.name}: {reason}; preparing again", file=sys.stderr)
        earlier = earlier_downloads(existing)
    if source.downloader is not None and not download:
        raise UserError("data.download: images are downloaded by the verb prepare alone; run `mmft prepare` with the same data=... words first")
    failed = final.with_name(f"{final.name}.report.jsonl")
    folder = final.with_name(f".{final.name}.tmp")
    _remove(folder)  # left by a crash
    folder.mkdir()
    try:
        preparation = _Preparation(source, folder, earlier)
        try:
            results = preparation.run()
        except _TooManyBadRows as error:
            os.replace(folder / "report.jsonl", failed)
            raise UserError(f"{error} All unusable rows: {failed}") from None
        finally:
            preparation.close()
        manifest: Manifest = {"format": FORMAT, "name": source.name, "key": key, "source": settings, "stamp": stamp, **results}  # type: ignore[typeddict-item]
        _write_json(folder / "manifest.json", manifest)
        prepared = PreparedData(folder)
        source.export(folder, final, (row for name in prepared.splits for row in prepared.split(name)))
        prepared.close()
        _remove(final)
        os.replace(folder, final)
    finally:
        _remove(folder)
    failed.unlink(missing_ok=True)
    return PreparedData(final)


class _TooManyBadRows(Exception):
    def __init__(self, name: str, bad: int, rows: int, allowed: float, reasons: str) -> None:
        super().__init__(f"data={name}: {bad} of {rows} rows cannot be used (data.max_bad_share={allowed:g} allows {int(allowed * rows)}){reasons}.")


def _check_share(prepared: PreparedData, allowed: float) -> None:
    """Raises UserError for a set that was prepared with a larger data.max_bad_share than `allowed` (mmft explore takes any)."""
    m = prepared.manifest
    bad = m.get("unusable", 0)
    if bad > allowed * m["rows_read"]:
        raise UserError(f"{_TooManyBadRows(m['name'], bad, m['rows_read'], allowed, '')} All unusable rows: {prepared.path / 'report.jsonl'}")


@dataclass
class _PendingRow:
    """A row whose images are being decoded; `keys` are their keys in the image index."""

    row: Row
    keys: list[str]


@dataclass
class _Preparation:
    """One preparation into the temporary `folder`. earlier: see Examiner. rows_read, first_reasons, row_notes: for messages."""

    source: Source
    folder: Path
    earlier: dict[str, Path]
    rows_read: int = 0
    first_reasons: list[str] = field(default_factory=list)
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
        self.pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="mmft-images")
        self.pending: dict[str, Future[ImageRecord]] = {}

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.archives.close()
        self.index.close()
        self.report.close()
        self.rows.close()

    def run(self) -> dict[str, Any]:
        """First pass: rows to rows.arrow. Second pass: rows.arrow to one file a split. Returns entries of the manifest."""
        self._first_pass()
        self._check_bad_share()
        unusable = self.report.counts["dropped"]
        given, prompts, grouped = self.rows.given_splits, self.rows.prompts, self.source.group_rows()
        kept = splits.first_of(prompts, given) if grouped else np.ones(len(given), dtype=bool)
        alike = self._near_duplicates()
        assignment = splits.assign_kept(kept, given, self.rows.offsets, self.rows.contents, self.index.digests(), self.source.splits,
                                        alike.group if alike is not None and self.source.splits.near else None)  # fmt: skip
        self._leave_out(assignment)
        near_note = self._write_pairs(alike, assignment.codes)
        shared = self._shared_references(prompts, assignment.codes, grouped)
        self.rows.release()
        parts, fingerprint, images = divide(self.folder, self.rows.path, assignment, self.index, self.report, shared)
        merged = int((assignment.codes == splits.MERGED).sum())
        notes = [*self.source.notes, *self.archives.unreadable, *(_counted(note, count) for note, count in self.row_notes.items())]
        if (unit := self.units.note()) is not None and self.source.boxes_unit == "pixels":
            notes.append(unit)
        notes += [near_note] if near_note else []
        if merged:
            notes.append(f"{merged + int(kept.sum())} rows became {int(kept.sum())}, one for each of their images and prompts (data.captions=group)")
        elif shared:
            notes.append(f"{len(shared)} held-out rows have the answers of other rows with the same images and prompt as references, too")
        notes += assignment.notes
        for note in notes:
            self.report.add("data", None, "note", note)
        write_unusable(self.folder, self.index)
        missing = any(r.error.startswith("missing image") for r in self.index.unusable())
        self.index.close()
        for name in ("index.sqlite", self.index.looks_file.name, "rows.arrow"):
            (self.folder / name).unlink()
        actions = self.report.counts
        return {
            "fingerprint": fingerprint, "root": self.root.resolve().as_posix() if self.root else None, "splits": parts,
            "images": images, "rows_read": self.rows_read, "unusable": unusable, "dropped": actions["dropped"], "changed": actions["changed"],
            "merged": merged, "archives": archive_states(self.archives) if self.uses_archives or missing else None,
            "reasons": dict(sorted(self.report.kinds.items())), "notes": notes, "boxes": self.units.rows,
            **({} if alike is None else {"near_duplicates": alike.number}),
            **{key: count for key, count in self.compared.items() if count},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": _versions(),
        }

    def _shared_references(self, prompts: np.ndarray, codes: np.ndarray, grouped: bool) -> dict[int, int]:
        """row -> prompt key of the rows that get the references of other rows: held-out rows, with `grouped` all rows."""
        keys, counts = np.unique(prompts, return_counts=True)
        repeated = keys[counts > 1]
        if not len(repeated):
            return {}
        receives = np.isin(prompts, repeated) & (np.isin(codes, (splits.VALIDATION, splits.TEST)) | (grouped & (codes == splits.TRAIN)))
        collect_references(self.rows.path, prompts, np.unique(prompts[receives]), self.index)
        return {int(row): int(prompts[row]) for row in np.flatnonzero(receives)}

    def _near_duplicates(self) -> NearDuplicates | None:
        """The near-duplicates among the contents that usable rows show; None if none are looked for."""
        if self.source.near_distance is None:
            return None
        looks = self.index.looks()
        used = np.zeros(len(looks), dtype=bool)
        used[self.rows.contents] = True
        return near_duplicates(looks, used, self.source.near_distance)

    def _write_pairs(self, alike: NearDuplicates | None, codes: np.ndarray) -> str:
        """Write near_duplicates.jsonl: the pairs of images that look alike, with their splits. Returns a note; "" if there are none."""
        if alike is None or not alike.number:
            return ""
        contents, rows = self.rows.contents, np.repeat(codes, np.diff(self.rows.offsets))
        used = np.zeros((len(alike.group), len(splits.NAMES)), dtype=bool)  # the splits that show a content
        for code in range(len(splits.NAMES)):
            used[contents[rows == code], code] = True
        record = self.index.first_of(np.unique(alike.pairs[:, :2]).tolist())
        with (self.folder / NEAR).open("w", encoding="ascii", newline="\n") as file:
            for *pair, bits in alike.pairs.tolist():
                images: list[AlikeImage] = [{"image": record[i].path, "stored": bool(record[i].stored), "splits": [name for name, there in zip(splits.NAMES, used[i]) if there]} for i in pair]
                file.write(json.dumps(AlikePair(bits=bits, images=images)) + "\n")
        trained = np.zeros(len(alike.group), dtype=bool)
        trained[alike.group[used[:, splits.TRAIN]]] = True
        leaking = int((used[:, splits.VALIDATION :].any(axis=1) & ~used[:, splits.TRAIN] & trained[alike.group]).sum())
        pairs = "1 pair of images looks alike" if alike.number == 1 else f"{alike.number} pairs of images look alike"
        held_out = "" if not leaking else f"; {leaking} held-out image{'s look' if leaking > 1 else ' looks'} like one of training (data.splits.near=true keeps such images together)"
        return f"near-duplicates: {pairs}{held_out}; {NEAR} lists the closest"

    def _leave_out(self, assignment: splits.Assignment) -> None:
        """Drop the rows of data.without. Raises UserError if it names none of the rows, or all rows of a split."""
        if not self.without:
            return
        unknown = self.without - self.left_out.keys()
        where = f"{WITHOUT}={self.source.without}"
        if len(unknown) == len(self.without):
            raise UserError(f"{where}: none of its {len(unknown)} ids is that of a row (it names {shown(min(unknown), 60)}; a row's id is {shown(self.first_id, 60)})")
        if unknown:
            assignment.notes.append(f"{where}: {len(unknown)} of its {len(self.without)} ids are no row's, e.g. {shown(min(unknown), 60)}")
        before = np.bincount(assignment.codes, minlength=splits.MERGED + 1)
        for row in self.left_out.values():
            assignment.codes[row] = splits.DROPPED
            assignment.dropped[row] = f"left out by hand: its id is listed in {self.source.without}"
        after = np.bincount(assignment.codes, minlength=splits.MERGED + 1)
        for code, name in enumerate(splits.NAMES):
            if before[code] and not after[code]:
                raise UserError(f"{where}: leaves out every row of the {name} split; list fewer rows")

    # -- first pass --

    def _first_pass(self) -> None:
        from tqdm import tqdm

        pending: deque[_PendingRow | BadRow] = deque()
        rows = tqdm(self.source.limited_rows(), total=self._expected(), desc=f"preparing {self.source.name}", unit=" rows",
                    delay=3, mininterval=0.5, file=sys.stderr, dynamic_ncols=True, disable=not shows_progress())
        with rows:
            for item in rows:
                self.rows_read += 1
                pending.append(self._start(item))
                if len(pending) >= WINDOW:
                    self._finish(pending.popleft())
        while pending:
            self._finish(pending.popleft())
        self.rows.close()

    def _expected(self) -> int | None:
        """The number of rows for the progress bar, as far as it is known; it shows the time left."""
        total, limit = self.source.total(), self.source.limit
        return limit if total is None else total if limit is None else min(total, limit)

    def _start(self, item: Row | BadRow) -> _PendingRow | BadRow:
        """Check a row's texts and start decoding its images."""
        if isinstance(item, BadRow):
            return item
        if item.id is None or not str(item.id).strip():
            item.id = str(self.rows_read)
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
        stored = archived or any(isinstance(image, bytes) or downloads and is_url(image) for image in item.images)
        keys = [self._submit(image, stored) for image in item.images]
        item.images = []
        return _PendingRow(item, keys)

    def _submit(self, image: str | bytes, stored: bool) -> str:
        if isinstance(image, bytes):
            key = "bytes:" + hashlib.sha256(image).hexdigest()
        else:
            key = ("copy:" if stored else "path:") + (image if is_url(image) else os.path.normpath(image))
        if key not in self.pending and self.index.get(key) is None:
            self.pending[key] = self.pool.submit(self.examiner.examine, image, stored)
        return key

    def _finish(self, item: _PendingRow | BadRow) -> None:
        """Write a row whose images are decoded, or drop it."""
        if isinstance(item, BadRow):
            self._drop(item)
            return
        records = [self._record(key) for key in item.keys]
        row = item.row
        error = next((r.error for r in records if r.error), None)
        if error is not None:
            self._drop(BadRow(row.where, error, row.id))
            return
        sizes = [(r.width, r.height) for r in records]
        reason = settle_regions(row, sizes, self.source.boxes_unit)
        if reason is not None:
            self._drop(BadRow(row.where, reason, row.id))
            return
        self.units.see(row, sizes)
        name = self.index.unique_id(str(row.id))
        if name != str(row.id):
            self.report.add(row.where, str(row.id), "changed", f"duplicate id: {shown(row.id)} is used before; this row is now {shown(name)}")
        self.row_notes.update(row.notes)
        if self.rows.count == 0:
            self.first_id = name
        if name in self.without:
            self.left_out[name] = self.rows.count
        given_split = -1 if row.split is None else splits.ALIASES[str(row.split).lower()]
        self.compared.update(rejected=int(row.rejected is not None), bad=int(row.label is False))
        self.rows.add(name, row, records, given_split)

    def _record(self, key: str) -> ImageRecord:
        if key in self.pending:  # of the rows that wait for an image the first one enters it
            return self.index.add(key, self.pending.pop(key).result())
        record = self.index.get(key)
        assert record is not None  # _submit found it there
        return record

    def _drop(self, bad: BadRow) -> None:
        bad = BadRow(bad.where, shorten_words(bad.reason), bad.id)
        self.report.add(bad.where, bad.id, "dropped", bad.reason)
        if len(self.first_reasons) < 3:
            self.first_reasons.append(f"{bad.where}: {bad.reason}")

    def _check_bad_share(self) -> None:
        if not self.rows_read:
            raise UserError(f"data={self.source.name}: the source has no rows; check data.path and the files it names")
        bad, allowed = self.report.counts["dropped"], self.source.max_bad_share
        if bad == self.rows_read or bad > allowed * self.rows_read:
            self.report.close()
            raise _TooManyBadRows(self.source.name, bad, self.rows_read, allowed, f": {'; '.join(self.first_reasons)}")


def _write_json(path: Path, value: Manifest) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def _counted(note: str, count: int) -> str:
    return f"{count} rows {note}" if count != 1 else f"1 row {note.replace('have', 'has', 1)}"


def _versions() -> dict[str, str]:
    import PIL
    import pyarrow

    from .. import __version__

    return {"mmft": __version__, "python": platform.python_version(), "pillow": PIL.__version__, "pyarrow": pyarrow.__version__}


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _write_errors(out_root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
            raise UserError(f"{out_root}: no space left on the disk; free some, or choose another output_dir") from None
        raise UserError(f"{out_root}: the data set cannot be written: {' '.join(str(error).split())}") from None


def prepared_data(cfg: DictConfig, download: bool = False, any_bad_share: bool = False) -> PreparedData:
    """The prepared set of a config, prepared now if needed; every verb that uses data calls this.

    any_bad_share: prepare it even if a larger share of its rows than data.max_bad_share is unusable, to look at it.
    """
    from ..config.build import build

    source, out_root = build(cfg.data, "data"), Path(cfg.output_dir) / "data"
    for each in (source.sources.values() if isinstance(source, Mix) else [source]) if any_bad_share else ():
        each.max_bad_share = 1.0
    if isinstance(source, Mix):
        return source.prepare(lambda each: prepare(each, out_root, download))
    if source.weight is not None:
        raise UserError(f"data.weight={source.weight}: only a source of a mix has a weight: data=mix data.sources.NAME.weight={source.weight}")
    if source.loss_weight is not None:
        raise UserError(f"data.loss_weight={source.loss_weight}: weighs a source of a mix against the others: data=mix data.sources.NAME.loss_weight={source.loss_weight}")
    return prepare(source, out_root, download)
