"""Write the files of a prepared data set: rows, splits, images and the report."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .image_index import ImageIndex, ImageRecord
from .prepared import ImageFile, SplitCounts
from .row_numbers import RowNumbers, find
from .row_text import hash_rows, prompt_key, render
from .sample import Row
from .splits import DROPPED, NAMES, Assignment
from .wording import shown

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000  # rows of one Arrow record batch
MOST_REFERENCES = 100  # that a row gets from other rows with the same images and prompt
REFERENCES_AT_ONCE = 2048  # about, in one Arrow record batch


def _schema() -> pa.Schema:
    import pyarrow as pa

    return pa.schema([
        ("id", pa.string()), ("images", pa.list_(pa.string())), ("sha256", pa.list_(pa.string())), ("stored", pa.bool_()),
        ("messages", pa.string()), ("references", pa.list_(pa.string())), ("choices", pa.list_(pa.string())),
        ("rejected", pa.string()), ("label", pa.bool_()),
    ])


class Report:
    """report.jsonl: one line for each row that was dropped or changed, with the reason."""

    def __init__(self, path: Path):
        self._file = path.open("w", encoding="utf-8", newline="\n")
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def add(self, where: str, id: str | None, action: str, reason: str) -> None:
        self.counts[action] += 1
        if action != "note":
            self.kinds[reason.split(":")[0]] += 1
        id = None if id is None else shown(id)
        # ASCII, because a text that cannot be written as UTF-8 may be what makes the row unusable
        self._file.write(json.dumps({"where": where, "id": id, "action": action, "reason": reason}) + "\n")

    def close(self) -> None:
        self._file.close()


class RowFile:
    """Usable rows as one Arrow stream. numbers: what the division into splits needs of them, in files beside it."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self.path, self.numbers = path, RowNumbers(path.parent)
        self._schema = _schema().append(pa.field("where", pa.string()))
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        self._writer.write_batch(pa.RecordBatch.from_pylist([], schema=self._schema))  # the schema is written before the first batch
        self._ends = [self._sink.tell()]  # where record batches begin and end in the file

    @property
    def count(self) -> int:
        """Rows added so far."""
        return self.numbers.count

    def add(self, ids: list[str], rows: list[Row], images: list[list[ImageRecord]], given_splits: list[int]) -> None:
        """Append one record batch. images: of each row."""
        import pyarrow as pa

        rendered = [render(row) for row in rows]
        records = [record for of_row in images for record in of_row]
        digests = [record.sha256 for record in records]
        ends = np.cumsum([0, *map(len, images)])
        text, flag = pa.string(), pa.bool_()
        columns = [
            pa.array(ids, text), _lists([record.path for record in records], ends), _lists(digests, ends),
            pa.array([any([r.stored for r in of_row]) for of_row in images], flag),
            pa.array([messages for _, messages in rendered], text), _column([row.references for row in rows]), _column([row.choices for row in rows]),
            pa.array([row.rejected for row in rows], text), pa.array([row.label for row in rows], flag), pa.array([row.where for row in rows], text),
        ]  # fmt: skip
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._ends.append(self._sink.tell())
        if len(records) == len(rows) == ends[-1] and (np.diff(ends) == 1).all():
            prompts = [*map(prompt_key, digests, [before for before, _ in rendered])]
        else:
            prompts = [prompt_key("".join(digests[start:end]), before) for start, end, (before, _) in zip(ends, ends[1:], rendered)]
        self.numbers.add(given_splits, [*map(len, images)], [record.content for record in records], prompts)

    def batches(self) -> Iterator[tuple[int, pa.RecordBatch, np.ndarray]]:
        """(number of its first row, record batch, prompt keys of its rows), in order. A batch is valid until the next one is asked for.

        All are read into the same memory. Arrow's reader allocates some for each batch, and the heap grows between them; of a mapped file all pages stay.
        """
        import pyarrow as pa

        lengths = np.diff(self._ends).tolist()
        start, room = 0, memoryview(bytearray(max(lengths, default=0)))
        with self.path.open("rb") as file, self.numbers.paths["prompts"].open("rb") as keys:
            file.seek(self._ends[0])
            for length in lengths:
                file.readinto(room[:length])
                batch = pa.ipc.read_record_batch(pa.py_buffer(room[:length]), self._schema)
                yield start, batch, np.fromfile(keys, np.int64, batch.num_rows)
                start += batch.num_rows

    def close(self) -> None:
        """End the files; their rows can be read then."""
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self.numbers.close()
            self._writer = None

    def remove(self) -> None:
        self.numbers.remove()
        self.path.unlink()


def _column(lists: list[list[str]]) -> pa.ListArray:
    return _lists([text for texts in lists for text in texts], np.cumsum([0, *map(len, lists)]))


def _lists(texts: list[str], ends: np.ndarray) -> pa.ListArray:
    """Lists of texts, the first of which is texts[ends[0]:ends[1]]: pa.array takes four times as long."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(texts, pa.string()))


def collect_references(rows: RowFile, repeated: np.ndarray, index: ImageIndex) -> None:
    """Store the references of all rows whose prompt key is in `repeated` in the index, as far as `divide` may ask for them. repeated: sorted, none twice."""
    import pyarrow as pa

    known = np.zeros(len(repeated), np.int32)
    for _, batch, keys in rows.batches():
        place, found = find(keys, repeated)
        wanted = np.flatnonzero(found & (known[place] < MOST_REFERENCES))
        for row, texts in zip(wanted.tolist(), batch["references"].take(pa.array(wanted)).to_pylist() if len(wanted) else ()):
            known[place[row]] += index.add_references(int(keys[row]), texts)


def divide(folder: Path, rows: RowFile, assignment: Assignment, index: ImageIndex, report: Report, shared: np.ndarray) -> tuple[dict[str, SplitCounts], str, int]:
    """Write one Arrow file a split, and images.arrow. Returns (counts of each split, fingerprint, number of images).

    shared: (rows,) bool, the rows that get the references of all rows with their prompt key.
    The fingerprint hashes (split, id, messages, references, image hashes, choices if there are any) in order, with rejected answer and label where a row has one; paths and file names do not enter it.
    """
    import pyarrow as pa

    schema = _schema()
    codes = assignment.codes
    present = [c for c in range(len(NAMES)) if assignment.count(c)]
    used = {c: _DigestSet() for c in present}
    hashes = {c: hashlib.sha256() for c in present}
    sinks = {c: pa.OSFile(str(folder / f"{NAMES[c]}.arrow"), "wb") for c in present}
    writers = {c: pa.ipc.new_stream(sinks[c], schema, options=pa.ipc.IpcWriteOptions(use_threads=False)) for c in present}
    for start, batch, keys in rows.batches():
        batch_codes = codes[start : start + batch.num_rows]
        for i in np.flatnonzero(batch_codes >= DROPPED).tolist():
            report.add(batch["where"][i].as_py(), batch["id"][i].as_py(), "dropped", assignment.reason(start + i))
        receiving = shared[start : start + batch.num_rows]
        for code in present:
            wanted = batch_codes == code
            if wanted.any():
                part = (batch if wanted.all() else batch.filter(pa.array(wanted))).select(schema.names)
                for piece in _share_references(part, receiving[wanted], keys[wanted], index):
                    writers[code].write_batch(piece)
                    used[code].update(piece["sha256"].flatten().unique().to_pylist())
                    hash_rows(hashes[code], piece)
    for code in present:
        writers[code].close()
        sinks[code].close()
    total = hashlib.sha256()
    for code in present:
        total.update(f"{NAMES[code]}:{hashes[code].hexdigest()}\n".encode())
    images = _write_images(folder, index, used)
    parts: dict[str, SplitCounts] = {NAMES[c]: {"rows": assignment.count(c), "images": len(used[c])} for c in present}
    return parts, total.hexdigest(), images


def _share_references(batch: pa.RecordBatch, receiving: np.ndarray, keys: np.ndarray, index: ImageIndex) -> Iterator[pa.RecordBatch]:
    """The batch with the references of other rows added to the rows of the mask `receiving`, a row's own ones first; in pieces of not too many references.

    receiving, keys: (rows,), keys are prompt keys.
    """
    if not receiving.any():
        yield batch
        return
    references = batch["references"].to_pylist()
    known: dict[int, list[str]] = {}
    first, count = 0, 0
    for row, (own, receives, key) in enumerate(zip(references, receiving.tolist(), keys.tolist())):
        if receives:
            if key not in known:
                known[key] = index.references(key, MOST_REFERENCES)
            references[row] = [*own, *(text for text in known[key] if text not in own)][: max(len(own), MOST_REFERENCES)]
        count += len(references[row])
        if count >= REFERENCES_AT_ONCE or row == batch.num_rows - 1:
            yield _with_references(batch.slice(first, row + 1 - first), references[first : row + 1])
            known.clear()
            first, count = row + 1, 0


def _with_references(batch: pa.RecordBatch, references: list[list[str]]) -> pa.RecordBatch:
    import pyarrow as pa

    position = batch.schema.get_field_index("references")
    return pa.record_batch([_column(references) if i == position else column for i, column in enumerate(batch.columns)], schema=batch.schema)


class _DigestSet:
    """The images of one split: 8 bytes of each sha256 in a sorted array, enough to count and to look up."""

    def __init__(self) -> None:
        self._sorted: np.ndarray = np.zeros(0, np.uint64)

    def update(self, digests: list[str]) -> None:
        if digests:
            new = np.unique(np.fromiter((int(d[:16], 16) for d in digests), np.uint64, len(digests)))
            if not np.isin(new, self._sorted).all():
                self._sorted = np.union1d(self._sorted, new)

    def __contains__(self, digest: str) -> bool:
        value = np.uint64(int(digest[:16], 16))
        at = int(np.searchsorted(self._sorted, value))
        return at < len(self._sorted) and self._sorted[at] == value

    def __len__(self) -> int:
        return len(self._sorted)


def _write_images(folder: Path, index: ImageIndex, used: dict[int, _DigestSet]) -> int:
    """Write images.arrow: each image file of a sample. Copies that only dropped rows used are deleted."""

    def images() -> Iterator[ImageFile]:
        for r in index.images():
            if any(r.sha256 in digests for digests in used.values()):
                yield {"path": r.path, "sha256": r.sha256, "bytes": r.size, "width": r.width, "height": r.height, "mtime_ns": r.mtime_ns,
                       "stored": bool(r.stored), "url": r.url}  # fmt: skip
            elif r.stored:
                (folder / r.path).unlink(missing_ok=True)

    return write_image_files(folder / "images.arrow", images())


def write_looks(path: Path, digests: Iterable[bytes], looks: np.ndarray, used: np.ndarray) -> None:
    """Write looks.arrow: (sha256, look) of the contents in the mask `used`. digests: of each content; looks: (contents,) LOOK."""
    import pyarrow as pa

    kind = pa.binary(looks.dtype.itemsize)
    schema = pa.schema([("sha256", pa.string()), ("look", kind)])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        remaining = ((digest.hex(), look.tobytes()) for digest, look, wanted in zip(digests, looks, used) if wanted)
        while batch := list(islice(remaining, BATCH)):
            writer.write_batch(pa.record_batch([pa.array([digest for digest, _ in batch], pa.string()), pa.array([look for _, look in batch], kind)], schema=schema))


def write_image_files(path: Path, images: Iterable[ImageFile]) -> int:
    """Write images.arrow. Returns the number of images."""
    import pyarrow as pa

    schema = pa.schema([
        ("path", pa.string()), ("sha256", pa.string()), ("bytes", pa.int64()), ("width", pa.int32()), ("height", pa.int32()),
        ("mtime_ns", pa.int64()), ("stored", pa.bool_()), ("url", pa.string()),
    ])
    count = 0
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        remaining = iter(images)
        while batch := list(islice(remaining, BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
            count += len(batch)
    return count
