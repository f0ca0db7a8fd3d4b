"""Write the files of a prepared data set: rows, splits, images and the report."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .image_index import ImageIndex, ImageRecord
from .prepared import ImageFile, SplitCounts
from .row_text import hash_rows, prompt_key, render
from .sample import Row
from .splits import DROPPED, NAMES, Assignment
from .wording import shown

if TYPE_CHECKING:
    import pyarrow as pa

BATCH = 1000  # rows of one Arrow record batch
MOST_REFERENCES = 100  # that a row gets from other rows with the same images and prompt


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
    """Usable rows as one Arrow stream; what the division into splits needs is kept in memory (21 bytes a row)."""

    def __init__(self, path: Path):
        import pyarrow as pa

        self.path = path
        self._schema = _schema().append(pa.field("where", pa.string()))
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, self._schema)
        self.release()

    @property
    def count(self) -> int:
        """Rows added so far."""
        return len(self._given_splits)

    @property
    def given_splits(self) -> np.ndarray:
        """(rows,) int8: the split code that each row came with, -1 for none."""
        return np.frombuffer(self._given_splits, dtype=np.int8) if self._given_splits else np.zeros(0, np.int8)

    @property
    def offsets(self) -> np.ndarray:
        """(rows + 1,) int64: row i's images are contents[offsets[i]:offsets[i + 1]]."""
        return np.frombuffer(self._offsets, dtype=np.int64)

    @property
    def contents(self) -> np.ndarray:
        """(images of all rows,) int32: content numbers."""
        return np.frombuffer(self._contents, dtype=np.int32) if self._contents else np.zeros(0, np.int32)

    @property
    def prompts(self) -> np.ndarray:
        """(rows,) int64: equal for rows with the same images and the same messages before the answer."""
        return np.frombuffer(self._prompts, dtype=np.int64) if self._prompts else np.zeros(0, np.int64)

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
        self._given_splits.extend(given_splits)
        self._contents.extend([record.content for record in records])
        self._offsets.extend((ends[1:] + self._offsets[-1]).tolist())
        if len(records) == len(rows) == ends[-1] and (np.diff(ends) == 1).all():
            self._prompts.extend(map(prompt_key, digests, [before for before, _ in rendered]))
        else:
            self._prompts.extend([prompt_key("".join(digests[start:end]), before) for start, end, (before, _) in zip(ends, ends[1:], rendered)])

    def release(self) -> None:
        """Free the arrays once the rows are divided."""
        self._given_splits, self._offsets, self._contents, self._prompts = array("b"), array("q", [0]), array("i"), array("q")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._sink.close()
            self._writer = None


def _column(lists: list[list[str]]) -> pa.ListArray:
    return _lists([text for texts in lists for text in texts], np.cumsum([0, *map(len, lists)]))


def _lists(texts: list[str], ends: np.ndarray) -> pa.ListArray:
    """Lists of texts, the first of which is texts[ends[0]:ends[1]]: pa.array takes four times as long."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(ends, pa.int32()), pa.array(texts, pa.string()))


def collect_references(rows: Path, prompts: np.ndarray, repeated: np.ndarray, index: ImageIndex) -> None:
    """Store the references of all rows whose prompt key is in `repeated` in the index, as far as `divide` may ask for them.

    rows: rows.arrow. prompts: (rows,) its keys. repeated: sorted, none twice.
    """
    import pyarrow as pa

    start, known = 0, np.zeros(len(repeated), np.int32)
    with pa.OSFile(str(rows), "rb") as source:
        for batch in pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(use_threads=False)):
            keys = prompts[start : start + batch.num_rows]
            place = np.minimum(np.searchsorted(repeated, keys), len(repeated) - 1)
            wanted = np.flatnonzero((repeated[place] == keys) & (known[place] < MOST_REFERENCES))
            for row, texts in zip(wanted.tolist(), batch["references"].take(pa.array(wanted)).to_pylist()):
                known[place[row]] += index.add_references(int(keys[row]), texts)
            start += batch.num_rows


def divide(folder: Path, rows: Path, assignment: Assignment, index: ImageIndex, report: Report,
           shared: tuple[np.ndarray, np.ndarray]) -> tuple[dict[str, SplitCounts], str, int]:
    """Write one Arrow file a split, and images.arrow. Returns (counts of each split, fingerprint, number of images).

    shared: (rows, in order; their prompt keys) that get the references of all rows with that key.
    The fingerprint hashes (split, id, messages, references, image hashes, choices if there are any) in order, with rejected answer and label where a row has one; paths and file names do not enter it.
    """
    import pyarrow as pa

    schema = _schema()
    codes = assignment.codes
    present = [c for c in range(DROPPED) if (codes == c).any()]
    used = {c: _DigestSet() for c in present}
    hashes = {c: hashlib.sha256() for c in present}
    sinks = {c: pa.OSFile(str(folder / f"{NAMES[c]}.arrow"), "wb") for c in present}
    writers = {c: pa.ipc.new_stream(sinks[c], schema, options=pa.ipc.IpcWriteOptions(use_threads=False)) for c in present}
    start = 0
    with pa.OSFile(str(rows), "rb") as source:  # not mapped: each batch is read once and then freed
        for batch in pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(use_threads=False)):
            batch_codes = codes[start:start + batch.num_rows]
            for i in np.flatnonzero(batch_codes == DROPPED):
                report.add(batch["where"][i].as_py(), batch["id"][i].as_py(), "dropped", assignment.dropped[start + int(i)])
            low, high = np.searchsorted(shared[0], (start, start + batch.num_rows))
            if low < high:
                batch = _share_references(batch, shared[0][low:high] - start, shared[1][low:high], index)
            for code in present:
                wanted = batch_codes == code
                if wanted.any():
                    part = (batch if wanted.all() else batch.filter(pa.array(wanted))).select(schema.names)
                    writers[code].write_batch(part)
                    used[code].update(part["sha256"].flatten().unique().to_pylist())
                    hash_rows(hashes[code], part)
            start += batch.num_rows
    for code in present:
        writers[code].close()
        sinks[code].close()
    total = hashlib.sha256()
    for code in present:
        total.update(f"{NAMES[code]}:{hashes[code].hexdigest()}\n".encode())
    images = _write_images(folder, index, used)
    parts: dict[str, SplitCounts] = {NAMES[c]: {"rows": int((codes == c).sum()), "images": len(used[c])} for c in present}
    return parts, total.hexdigest(), images


def _share_references(batch: pa.RecordBatch, rows: np.ndarray, keys: np.ndarray, index: ImageIndex) -> pa.RecordBatch:
    """The batch with the references of other rows added to some rows, the row's own ones first. rows, keys: their places in the batch and prompt keys."""
    import pyarrow as pa

    references = batch["references"].to_pylist()
    known: dict[int, list[str]] = {}
    for row, key in zip(rows.tolist(), keys.tolist()):
        if key not in known:
            known[key] = index.references(key, MOST_REFERENCES)
        own = references[row]
        references[row] = [*own, *(text for text in known[key] if text not in own)][: max(len(own), MOST_REFERENCES)]
    position = batch.schema.get_field_index("references")
    columns = [pa.array(references, type=batch.schema.field(position).type) if i == position else c for i, c in enumerate(batch.columns)]
    return pa.record_batch(columns, schema=batch.schema)


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
