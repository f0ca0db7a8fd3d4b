"""The canonical text of rows: messages as JSON, the key of a prompt, and the lines that the fingerprint of a data set hashes."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .sample import Message, PlainRow, Row, user_turn

if TYPE_CHECKING:
    import pyarrow as pa

_quoted = json.encoder.encode_basestring  # one text as JSON
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # json.dumps makes an encoder at every call
MOST_BYTES = 1 << 19  # of a batch that is joined to lines at once, which takes some times as much memory


def render(row: Row) -> tuple[str, str]:
    """(the messages before the last one, all messages) as compact JSON."""
    if type(row) is PlainRow:
        before = _question(row.prompt)
        return before, f'{before[:-1]},{{"role":"assistant","content":[{{"type":"text","text":{_quoted(row.answer)}}}]}}]'
    parts = [_message(message) for message in row.messages]
    before = ",".join(parts[:-1])
    return f"[{before}]", f"[{before},{parts[-1]}]" if before else f"[{','.join(parts)}]"


@lru_cache(1024)
def _question(prompt: str) -> str:
    return _to_json([user_turn(1, prompt)])


def _message(message: Message) -> str:
    """What `_to_json` returns, for messages of texts and images in a third of its time."""
    if len(message) == 2:
        parts = []
        for part in message["content"]:
            if part["type"] == "text" and len(part) == 2:
                parts.append(f'{{"type":"text","text":{_quoted(part["text"])}}}')
            elif part["type"] == "image" and len(part) == 1:
                parts.append('{"type":"image"}')
            else:
                return _to_json(message)
        return f'{{"role":{_quoted(message["role"])},"content":[{",".join(parts)}]}}'
    return _to_json(message)


@lru_cache(4096)
def prompt_key(images: str, before: str) -> int:
    """A 63-bit hash of image contents (their hashes, joined) and of the messages before an answer, as `render` returns them."""
    text = images + before
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big") >> 1


def hash_rows(digest: hashlib._Hash, rows: pa.RecordBatch) -> None:
    """Update `digest` with a line for each row: `[id,messages,[references],[image hashes]]`, then the choices if there are any, then rejected answer and label
    if there is one, all as compact JSON (the messages are a text that holds JSON).
    """
    import pyarrow.compute as pc

    if rows.nbytes > MOST_BYTES and rows.num_rows > 1:
        half = rows.num_rows // 2
        hash_rows(digest, rows.slice(0, half))
        hash_rows(digest, rows.slice(half))
        return
    lines = pc.binary_join_element_wise("[", _quote(rows["id"]), ",", _quote(rows["messages"]), ",", _quote_lists(rows["references"]), ",", _quote_lists(rows["sha256"]),
                                        *_more(rows), "]\n", "")  # fmt: skip
    _, offsets, data = lines.buffers()
    ends = np.frombuffer(offsets, np.int32)[[lines.offset, lines.offset + len(lines)]]
    digest.update(memoryview(data)[ends[0] : ends[1]])


def _more(rows: pa.RecordBatch) -> list[pa.Array]:
    """What most rows do not have: choices, a rejected answer, a label."""
    import pyarrow as pa

    if not len(rows["choices"].flatten()) and rows["rejected"].null_count == rows["label"].null_count == rows.num_rows:
        return []
    lines = []
    for choices, rejected, label in zip(*(rows[name].to_pylist() for name in ("choices", "rejected", "label"))):
        lines.append(f",[{','.join(map(_quoted, choices))}]" if choices else "")
        lines[-1] += "," + _to_json({"rejected": rejected, "label": label}) if rejected is not None or label is not None else ""
    return [pa.array(lines, pa.string())]


def _quote(texts: pa.Array) -> pa.Array:
    """Each text as JSON."""
    import pyarrow as pa
    import pyarrow.compute as pc

    _, offsets, buffer = texts.buffers()
    data = np.zeros(0, np.uint8)
    if len(texts) and buffer is not None and buffer.size:
        ends = np.frombuffer(offsets, np.int32)[[texts.offset, texts.offset + len(texts)]]
        data = np.frombuffer(buffer, np.uint8)[ends[0] : ends[1]]
    if (data < 32).any():  # line breaks and other control characters
        return pa.array(map(_quoted, texts.to_pylist()), pa.string(), size=len(texts))
    if (data == ord("\\")).any():
        texts = pc.replace_substring(texts, "\\", "\\\\")
    if (data == ord('"')).any():
        texts = pc.replace_substring(texts, '"', '\\"')
    return pc.binary_join_element_wise('"', texts, '"', "")


def _quote_lists(lists: pa.ListArray) -> pa.Array:
    """Each list of texts as JSON."""
    import pyarrow as pa
    import pyarrow.compute as pc

    offsets = lists.offsets.to_numpy()
    quoted = pa.ListArray.from_arrays(pa.array(offsets - offsets[0]), _quote(lists.flatten()))
    return pc.binary_join_element_wise("[", pc.binary_join(quoted, ","), "]", "")
