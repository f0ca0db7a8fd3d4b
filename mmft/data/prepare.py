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
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.errors import UserError
from . import splits
from .first_pass import FirstPass, TooManyBadRows
from .mix import Mix
from .near import NearDuplicates, near_duplicates
from .prepared import FORMAT, LOOKS, NEAR, AlikeImage, AlikePair, Manifest, PreparedData
from .row_numbers import find
from .sources.base import Settings, Source, Stamp
from .staleness import archive_states, earlier_downloads, stale, write_unusable
from .without import KEY as WITHOUT
from .wording import shown
from .writer import collect_references, divide, write_looks

if TYPE_CHECKING:
    from omegaconf import DictConfig

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
        with _memory_given_back():
            first = FirstPass(source, folder, earlier)
            try:
                first.run()
                results = _SecondPass(first).run()
            except TooManyBadRows as error:
                os.replace(folder / "report.jsonl", failed)
                raise UserError(f"{error} All unusable rows: {failed}") from None
            finally:
                first.close()
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


@contextmanager
def _memory_given_back() -> Iterator[None]:
    """Arrow's own allocator keeps what was freed, which is some 20 MB here; the system's gives it back, and is as fast."""
    import pyarrow as pa

    before = pa.default_memory_pool()
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        yield
    finally:
        pa.set_memory_pool(before)


def _check_share(prepared: PreparedData, allowed: float) -> None:
    """Raises UserError for a set that was prepared with a larger data.max_bad_share than `allowed` (mmft explore takes any)."""
    m = prepared.manifest
    bad = m.get("unusable", 0)
    if bad > allowed * m["rows_read"]:
        raise UserError(f"{TooManyBadRows(m['name'], bad, m['rows_read'], allowed, '')} All unusable rows: {prepared.path / 'report.jsonl'}")


class _SecondPass:
    """The usable rows of the first pass are assigned to splits and written to one file a split."""

    def __init__(self, first: FirstPass) -> None:
        self.first, self.source, self.folder = first, first.source, first.folder
        self.index, self.report, self.rows = first.index, first.report, first.rows

    def run(self) -> dict[str, Any]:
        """Returns entries of the manifest."""
        first = self.first
        unusable = self.report.counts["dropped"]
        self.index.forget_ids()
        numbers, grouped = self.rows.numbers, self.source.group_rows()
        later = splits.later_rows(numbers) if grouped else None
        alike = self._near_duplicates()
        assignment = splits.assign(numbers, self.index.digests(), self.source.splits, alike.group if alike is not None and self.source.splits.near else None, later)
        self._leave_out(assignment)
        near_note = self._write_pairs(alike, assignment.codes)
        shared = self._shared_references(assignment.codes, grouped)
        parts, fingerprint, images = divide(self.folder, self.rows, assignment, self.index, self.report, shared)
        merged, sharing = assignment.count(splits.MERGED), int(np.count_nonzero(shared))
        notes = [*self.source.notes, *first.archives.unreadable, *(_counted(note, count) for note, count in first.row_notes.items())]
        if (unit := first.units.note()) is not None and self.source.boxes_unit == "pixels":
            notes.append(unit)
        notes += [near_note] if near_note else []
        if merged:
            notes.append(f"{numbers.count} rows became {numbers.count - merged}, one for each of their images and prompts (data.captions=group)")
        elif sharing:
            notes.append(f"{sharing} held-out rows have the answers of other rows with the same images and prompt as references, too")
        notes += assignment.notes
        for note in notes:
            self.report.add("data", None, "note", note)
        write_unusable(self.folder, self.index)
        missing = any(r.error.startswith("missing image") for r in self.index.unusable())
        self.index.close()
        for name in ("index.sqlite", self.index.looks_file.name):
            (self.folder / name).unlink()
        self.rows.remove()
        actions = self.report.counts
        return {
            "fingerprint": fingerprint, "root": first.root.resolve().as_posix() if first.root else None, "splits": parts,
            "images": images, "rows_read": first.rows_read, "unusable": unusable, "dropped": actions["dropped"], "changed": actions["changed"],
            "merged": merged, "archives": archive_states(first.archives) if first.uses_archives or missing else None,
            "reasons": dict(sorted(self.report.kinds.items())), "notes": notes, "boxes": first.units.rows,
            **({} if alike is None else {"near_duplicates": alike.number}),
            **{key: count for key, count in first.compared.items() if count},
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": _versions(),
        }

    def _shared_references(self, codes: np.ndarray, grouped: bool) -> np.ndarray:
        """(rows,) bool: the rows that get the references of other rows with their prompt: held-out rows, with `grouped` all rows. Stores these references."""
        receives, shared = np.zeros(len(codes), dtype=bool), []
        for bucket in self.rows.numbers.by_prompt():
            repeated = bucket.repeated()
            used = np.zeros(len(repeated), dtype=bool)
            for rows, keys in bucket.parts() if len(repeated) else ():
                place, known = find(keys, repeated)
                chosen = known & (np.isin(codes[rows], (splits.VALIDATION, splits.TEST)) | (grouped & (codes[rows] == splits.TRAIN)))
                receives[rows[chosen]] = True
                used[place[chosen]] = True
            shared.append(repeated[used])
        if receives.any():
            collect_references(self.rows, np.concatenate(shared), self.index)
        return receives

    def _near_duplicates(self) -> NearDuplicates | None:
        """The near-duplicates among the contents that usable rows show; None if none are looked for."""
        if self.source.near_distance is None:
            return None
        looks = self.index.looks()
        used = np.zeros(len(looks), dtype=bool)
        for part in self.rows.numbers.parts():
            used[part.contents] = True
        write_looks(self.folder / LOOKS, self.index.digests(), looks, used)
        return near_duplicates(looks, used, self.source.near_distance)

    def _write_pairs(self, alike: NearDuplicates | None, codes: np.ndarray) -> str:
        """Write near_duplicates.jsonl: the pairs of images that look alike, with their splits. Returns a note; "" if there are none."""
        if alike is None or not alike.number:
            return ""
        used = np.zeros((len(alike.group), len(splits.NAMES)), dtype=bool)  # the splits that show a content
        for part in self.rows.numbers.parts():
            shown_in = part.of(codes)[part.owners]
            for code in range(len(splits.NAMES)):
                used[part.contents[shown_in == code], code] = True
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
        first = self.first
        if not first.without:
            return
        unknown = first.without - first.left_out.keys()
        where = f"{WITHOUT}={self.source.without}"
        if len(unknown) == len(first.without):
            raise UserError(f"{where}: none of its {len(unknown)} ids is that of a row (it names {shown(min(unknown), 60)}; a row's id is {shown(first.first_id, 60)})")
        if unknown:
            assignment.notes.append(f"{where}: {len(unknown)} of its {len(first.without)} ids are no row's, e.g. {shown(min(unknown), 60)}")
        before = [assignment.count(code) for code in range(len(splits.NAMES))]
        for row in first.left_out.values():
            assignment.codes[row] = splits.DROPPED + len(assignment.reasons)
        assignment.reasons.append(f"left out by hand: its id is listed in {self.source.without}")
        for code, name in enumerate(splits.NAMES):
            if before[code] and not assignment.count(code):
                raise UserError(f"{where}: leaves out every row of the {name} split; list fewer rows")


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
