"""Write the files of a prepared data set: rows, splits, images and the report."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .image_index import ImageIndex, ImageRecord
from .prepared import ImageFile, SplitCounts
from .sample import Message, Row
from .splits import DROPPED, NAMES, Assignment
from .wording import shown

if TYPE_CHECKING:
    import pyarrow as pa

_quoted = json.encoder.encode_basestring  # one text as JSON; the lines that are hashed hold nothing but texts and lists of them
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes an encoder at every call
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
        self._columns: list[list[Any]] = [[] for _ in self._schema]
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

    def add(self, id: str, row: Row, images: list[ImageRecord], given_split: int) -> None:
        cells = (
            id, [r.path for r in images], [r.sha256 for r in images], any(r.stored for r in images),
            _to_json(row.messages), row.references, row.choices, row.rejected, row.label, row.where,
        )
        for column, cell in zip(self._columns, cells):
            column.append(cell)
        self._given_splits.append(given_split)
        self._contents.extend(r.content for r in images)
        self._offsets.append(len(self._contents))
        self._prompts.append(prompt_key(cells[2], row.messages[:-1]))
        if len(self._columns[0]) == BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        arrays = [pa.array(column, type=f.type) for column, f in zip(self._columns, self._schema)]
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        for column in self._columns:
            column.clear()

    def release(self) -> None:
        """Free the arrays once the rows are divided."""
        self._given_splits, self._offsets, self._contents, self._prompts = array("b"), array("q", [0]), array("i"), array("q")

    def close(self) -> None:
        if self._writer is not None:
            if self._columns[0]:
                self._flush()
            self._writer.close()
            self._sink.close()
            self._writer = None


def prompt_key(images: list[str], messages: list[Message]) -> int:
    """A 63-bit hash of image contents and the messages before an answer."""
    text = "".join(images) + _to_json(messages)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def collect_references(rows: Path, prompts: np.ndarray, repeated: np.ndarray, index: ImageIndex) -> None:
    """Store the references of all rows whose prompt key is in `repeated` in the index. rows: rows.arrow; prompts: (rows,) its keys."""
    import pyarrow as pa

    start = 0
    with pa.OSFile(str(rows), "rb") as source:
        for batch in pa.ipc.open_stream(source):
            keys = prompts[start : start + batch.num_rows]
            for i in np.flatnonzero(np.isin(keys, repeated)):
                index.add_references((int(keys[i]), text) for text in batch["references"][i].as_py())
            start += batch.num_rows


def divide(folder: Path, rows: Path, assignment: Assignment, index: ImageIndex, report: Report,
           shared: Mapping[int, int] | None = None) -> tuple[dict[str, SplitCounts], str, int]:
    """Write one Arrow file a split, and images.arrow. Returns (counts of each split, fingerprint, number of images).

    shared: row -> prompt key of rows that get the references of all rows with that key.
    The fingerprint hashes (split, id, messages, references, image hashes, choices if there are any) in order, with rejected answer and label where a row has one; paths and file names do not enter it.
    """
    import pyarrow as pa

    schema = _schema()
    codes = assignment.codes
    present = [c for c in range(DROPPED) if (codes == c).any()]
    used = {c: _DigestSet() for c in present}
    hashes = {c: hashlib.sha256() for c in present}
    sinks = {c: pa.OSFile(str(folder / f"{NAMES[c]}.arrow"), "wb") for c in present}
    writers = {c: pa.ipc.new_stream(sinks[c], schema) for c in present}
    start = 0
    with pa.OSFile(str(rows), "rb") as source:  # not mapped: each batch is read once and then freed
        for batch in pa.ipc.open_stream(source):
            batch_codes = codes[start:start + batch.num_rows]
            for i in np.flatnonzero(batch_codes == DROPPED):
                report.add(batch["where"][i].as_py(), batch["id"][i].as_py(), "dropped", assignment.dropped[start + int(i)])
            if shared:
                batch = _share_references(batch, start, shared, index)
            for code in present:
                part = batch.filter(pa.array(batch_codes == code)).select(schema.names)
                if part.num_rows:
                    writers[code].write_batch(part)
                    _hash(hashes[code], used[code], part)
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


def _share_references(batch: pa.RecordBatch, start: int, shared: Mapping[int, int], index: ImageIndex) -> pa.RecordBatch:
    """The batch with the references of other rows added, the row's own ones first."""
    import pyarrow as pa

    references = batch["references"].to_pylist()
    for i, own in enumerate(references):
        if (key := shared.get(start + i)) is not None:
            others = dict.fromkeys(index.references(key, MOST_REFERENCES))
            references[i] = [*own, *(text for text in others if text not in own)][: max(len(own), MOST_REFERENCES)]
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


def _hash(digest: hashlib._Hash, used: _DigestSet, part: pa.RecordBatch) -> None:
    sha256 = part["sha256"]
    used.update(sha256.flatten().to_pylist())
    lines = []
    names = ("id", "messages", "references", "sha256", "choices", "rejected", "label")
    for id, messages, references, images, choices, rejected, label in zip(*(part[name].to_pylist() for name in names)):
        more = f",[{','.join(map(_quoted, choices))}]" if choices else ""
        more += "," + _to_json({"rejected": rejected, "label": label}) if rejected is not None or label is not None else ""
        lines.append(f"[{_quoted(id)},{_quoted(messages)},[{','.join(map(_quoted, references))}],[{','.join(map(_quoted, images))}]{more}]\n")
    digest.update("".join(lines).encode())


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
