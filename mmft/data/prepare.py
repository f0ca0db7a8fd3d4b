"""prepare: a source's rows, checked and divided, into a prepared data set on disk, in memory that does not grow with them."""

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
from typing import Any

from ..common.errors import UserError
from . import splits
from .download import Download, is_url
from .image_index import Index, Record, examine
from .prepared import FORMAT, PreparedData
from .row_checks import problem, tidy
from .sample import Bad, Row
from .sources.base import Source
from .writer import Report, RowFile, divide

WINDOW = 64  # rows whose images are being decoded at once; also the most whose bytes are held


def prepare(source: Source, out_root: str | Path, download: bool = False) -> PreparedData:
    """The prepared data set of `source` below `out_root`, made now unless a complete one of the same key is there.

    A source that downloads images is prepared only with `download`, which the verb prepare alone gives.

    Errors raised: UserError if files or columns are missing, too many rows are bad, a split would be empty, or
    nothing can be written. Nothing half-written stays; the rows that were bad stay listed in `<name>-<key>.report.jsonl`.
    """
    from filelock import FileLock, Timeout

    out_root = Path(out_root).resolve()
    settings, stamp = source.settings(), source.stamp()
    content = {k: v for k, v in settings.items() if k != "max_bad_share"}  # a limit, which changes no row
    key = hashlib.sha256(json.dumps([FORMAT, content, stamp], sort_keys=True, default=str).encode()).hexdigest()[:12]
    final = out_root / f"{source.name}-{key}"
    with _as_user_errors(out_root):
        out_root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out_root / f".{final.name}.lock")  # the system frees it when its holder dies
        try:
            lock.acquire(timeout=1)
        except Timeout:
            print(f"mmft: another process is preparing {final.name}; waiting for it", file=sys.stderr)
            lock.acquire()
        try:
            return _prepare(source, settings, stamp, key, final, download)
        finally:
            lock.release()


def _prepare(source: Source, settings: dict, stamp: dict, key: str, final: Path, download: bool) -> PreparedData:
    if final.is_dir():
        found = PreparedData(final)
        changed = found.changed_image()
        if changed is None:
            return found
        print(f"mmft: {changed} is not what it was when {final.name} was prepared; preparing again", file=sys.stderr)
    if source.download is not None and not download:
        raise UserError("data.download: images are fetched by the verb prepare alone; run `mmft prepare` with the same data=... words first")
    failed = final.with_name(f"{final.name}.report.jsonl")
    folder = final.with_name(f".{final.name}.tmp")
    _remove(folder)  # what a crash left behind
    folder.mkdir()
    try:
        preparation = _Preparation(source, folder)
        try:
            manifest = preparation.run()
        except _TooManyBad as error:
            os.replace(folder / "report.jsonl", failed)
            raise UserError(f"{error} All of them: {failed}") from None
        finally:
            preparation.close()
        manifest = {"format": FORMAT, "name": source.name, "key": key, "source": settings, "stamp": stamp, **manifest}
        _write_json(folder / "manifest.json", manifest)
        made = PreparedData(folder)
        source.export(folder, final, (row for name in made.splits for row in made.split(name)))
        made.close()
        _remove(final)
        os.replace(folder, final)
    finally:
        _remove(folder)
    failed.unlink(missing_ok=True)
    return PreparedData(final)


class _TooManyBad(Exception):
    pass


@dataclass
class _Waiting:
    """A row whose images are being looked at; `keys` name them in the index."""

    row: Row
    keys: list[str]


@dataclass
class _Preparation:
    source: Source
    folder: Path
    read: int = 0
    reasons: Counter = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.source.data_root()
        self.index = Index(self.folder / "index.sqlite")
        self.report = Report(self.folder / "report.jsonl")
        self.rows = RowFile(self.folder / "rows.arrow")
        self.pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="mmft-images")
        self.pending: dict[str, Future[Record]] = {}

    def close(self) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        self.index.close()
        self.report.close()
        self.rows.close()

    def run(self) -> dict[str, Any]:
        """Both passes: rows to rows.arrow, then rows.arrow to one file a split. Returns the manifest's entries."""
        self._first_pass()
        self._judge()
        assignment = splits.assign(self.rows.own, self.rows.offsets, self.rows.contents, self.index.digests(), self.source.splits)
        self.rows.release()
        parts, fingerprint, images = divide(self.folder, self.rows.path, assignment, self.index, self.report)
        for note in assignment.notes:
            self.report.add("data.splits", None, "note", note)
        self.index.close()
        for name in ("index.sqlite", "rows.arrow"):
            (self.folder / name).unlink()
        actions = self.report.counts
        return {
            "fingerprint": fingerprint, "root": self.root.resolve().as_posix() if self.root else None, "splits": parts,
            "images": images, "rows_read": self.read, "dropped": actions["dropped"], "changed": actions["changed"],
            "reasons": dict(sorted(self.report.kinds.items())), "notes": assignment.notes,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": _versions(),
        }

    # -- first pass --

    def _first_pass(self) -> None:
        from tqdm import tqdm

        waiting: deque[_Waiting | Bad] = deque()
        rows = tqdm(self.source.first_rows(), total=self.source.total(), desc=f"preparing {self.source.name}", unit=" rows",
                    delay=3, mininterval=0.5, file=sys.stderr, dynamic_ncols=True)
        with rows:
            for item in rows:
                self.read += 1
                waiting.append(self._enter(item))
                if len(waiting) >= WINDOW:
                    self._finish(waiting.popleft())
        while waiting:
            self._finish(waiting.popleft())
        self.rows.close()

    def _enter(self, item: Row | Bad) -> _Waiting | Bad:
        if isinstance(item, Bad):
            return item
        if item.id is None or not str(item.id).strip():
            item.id = str(self.read)
        tidy(item)
        reason = problem(item, self.source.text_only)
        if reason is None and item.split is not None and str(item.split).lower() not in splits.ALIASES:
            reason = f"unknown split: {item.split!r}; use train, validation or test"
        if reason is not None:
            return Bad(item.where, reason, item.id)
        fetched = self.source.download is not None
        stored = any(isinstance(image, bytes) or fetched and is_url(image) for image in item.images)  # a row's images lie in one place
        keys = [self._submit(image, stored) for image in item.images]
        item.images = []
        return _Waiting(item, keys)

    def _submit(self, image: str | bytes, stored: bool) -> str:
        if isinstance(image, bytes):
            key = "bytes:" + hashlib.sha256(image).hexdigest()
        else:
            key = ("copy:" if stored else "path:") + (image if is_url(image) else os.path.normpath(image))
        if key not in self.pending and self.index.get(key) is None:
            download = self.source.download
            assert download is None or isinstance(download, Download)  # __post_init__ made it of its keys
            self.pending[key] = self.pool.submit(examine, image, self.root, self.folder if stored else None, download)
        return key

    def _finish(self, item: _Waiting | Bad) -> None:
        if isinstance(item, Bad):
            self._drop(item)
            return
        records = [self._record(key) for key in item.keys]
        row = item.row
        wrong = next((r.error for r in records if r.error), None)
        if wrong is not None:
            self._drop(Bad(row.where, wrong, row.id))
            return
        name = self.index.unique_id(str(row.id))
        if name != str(row.id):
            self.report.add(row.where, str(row.id), "changed", f"duplicate id: {row.id} is used before; this row is now {name}")
        own = -1 if row.split is None else splits.ALIASES[str(row.split).lower()]
        self.rows.add(name, row, records, own)

    def _record(self, key: str) -> Record:
        record = self.index.get(key)
        return record if record is not None else self.index.add(key, self.pending.pop(key).result())

    def _drop(self, bad: Bad) -> None:
        self.report.add(bad.where, bad.id, "dropped", bad.reason)
        if len(self.first) < 3:
            self.first.append(f"{bad.where}: {bad.reason}")

    def _judge(self) -> None:
        if not self.read:
            raise UserError(f"data={self.source.name}: the source has no rows")
        bad, allowed = self.report.counts["dropped"], self.source.max_bad_share
        if bad == self.read or bad > allowed * self.read:
            self.report.close()
            raise _TooManyBad(f"data={self.source.name}: {bad} of {self.read} rows cannot be used "
                              f"(data.max_bad_share={allowed:g} allows {int(allowed * self.read)}): {'; '.join(self.first)}.")


def _write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        json.dump(value, file, ensure_ascii=False, indent=2)
        file.write("\n")


def _versions() -> dict[str, str]:
    import PIL
    import pyarrow

    from .. import __version__

    return {"mmft": __version__, "python": platform.python_version(), "pillow": PIL.__version__, "pyarrow": pyarrow.__version__}


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def _as_user_errors(out_root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "disk is full" in str(error):
            raise UserError(f"{out_root}: no space left on the disk; free some, or choose another output_dir") from None
        raise UserError(f"{out_root}: the data set cannot be written: {' '.join(str(error).split())}") from None


def prepared_data(cfg: Any, download: bool = False) -> Any:
    """The prepared set of a config, made now or found; every verb that needs data calls this."""
    from ..config.build import build

    return prepare(build(cfg.data), Path(cfg.output_dir) / "data", download)
