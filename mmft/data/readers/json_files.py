"""Read JSON files of all common layouts one row at a time: arrays, JSON Lines, rows under a key, objects keyed by image name, columns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from ...common.errors import UserError, nearest
from ..images import SUFFIXES
from ..sample import BadRow
from ..wording import listed, shown
from .text import open_text

Record = tuple[str, dict[str, Any]]  # (name of the row in messages, its cells)

CHUNK = 1 << 20  # characters of JSON read at once, which limits memory use
LONGEST = 1 << 28  # characters of one element; after a syntax error early in a file the rest is not read into memory
# Lists of objects under these keys are the turns or the images of one row, not rows.
_IMAGE_COLUMNS = ("image", "img", "images", "image_path", "file_name", "filename")
_PARTS_OF_A_ROW = (
    "messages", "conversations", "conversation", "prompt", "completion", "chosen", "rejected", "text", "texts", "turns", "qa", "system", "references", "id", "split",
)  # fmt: skip
_LINES = (".jsonl", ".ndjson")
_IMAGE_NAME = re.compile(rf"(?i).*({'|'.join(re.escape(s) for s in SUFFIXES)})")


def read_json(path: Path, encoding: str | None, rows: str | None, note: Callable[[str], None]) -> Iterator[Record | BadRow]:
    """The rows of a JSON or JSON Lines file. rows: the key (`data`, or `result.rows`) under which they stand; null: detected.

    Raises UserError for a file that is not JSON, or whose rows stand under several keys.
    """
    with open_text(path, encoding) as file:
        line = ""
        while not line.strip():
            line = file.readline(CHUNK)
            if not line:
                return  # an empty file has no rows
        more_lines = line.endswith("\n") and any(text.strip() for text in file)
    start = line.lstrip("\ufeff \t\r\n")[:1]
    if start not in ("{", "["):
        raise UserError(f"{path}: is not JSON; it must hold an array of objects, or an object a line (JSON Lines)")
    whole_line = _parses(line.rstrip().removesuffix(","))
    if rows is None and more_lines and (whole_line or start == "{" and not re.search(r"[{\[,:]\s*$", line)):
        yield from _lines(path, encoding)
    elif start == "[" and rows is None:
        yield from _array(path, encoding, None)
    else:
        yield from _document(path, encoding, rows, note, long_lines=start == "{" and not line.endswith("\n"))


def _parses(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _lines(path: Path, encoding: str | None) -> Iterator[Record | BadRow]:
    name, decode = path.name, json.JSONDecoder().raw_decode
    with open_text(path, encoding) as file:
        for number, line in enumerate(file, 1):
            text = line.strip()
            if not text:
                continue
            where = f"{name}:{number}"
            try:
                value = _value_of(text, decode)
            except (ValueError, RecursionError) as error:
                yield BadRow(where, f"broken JSON: {error}")
                continue
            if isinstance(value, dict):
                yield where, value
            elif isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
                yield from ((f"{where}[{n}]", row) for n, row in enumerate(value, 1))
            else:
                yield _record(where, value)


def _value_of(text: str, decode: Callable[[str], tuple[Any, int]]) -> Any:
    """The value of a line. `decode` takes half of the time of json.loads, whose messages are the better ones. Raises ValueError, RecursionError."""
    try:
        value, end = decode(text)
        if end == len(text):
            return value
    except (ValueError, RecursionError):
        pass
    return json.loads(text.removesuffix(","))


def _record(where: str, value: Any) -> Record | BadRow:
    return (where, value) if isinstance(value, dict) else BadRow(where, "broken JSON: the row is not an object")


def _array(path: Path, encoding: str | None, key: str | None) -> Iterator[Record | BadRow]:
    for number, (value, _) in enumerate(json_array(path, key, encoding), 1):
        yield _record(f"{path.name}[{number}]", value)


def _document(path: Path, encoding: str | None, rows: str | None, note: Callable[[str], None], long_lines: bool) -> Iterator[Record | BadRow]:
    """The rows of a file that is one JSON object, or several. long_lines: the first line is longer than a chunk."""
    if rows is None:
        keys, keyed, more = _layout(path, encoding)
        if more or keyed or not keys:
            several = _lines if long_lines else _values
            yield from several(path, encoding) if more else _keyed(path, encoding, "") if keyed else _whole(path, encoding, note)
            return
        if len(keys) > 1:
            coco = "; a COCO file is read with data=coco data.path=FOLDER" if {"images", "annotations"} <= set(keys) else ""
            raise UserError(f"{path}: has rows under several keys ({listed(keys)}); name one with data.rows=KEY{coco}")
        rows = keys[0]
        note(f"{path.name}: the rows are read from the key {rows} (data.rows={rows})")
    with open_text(path, encoding) as file:
        stream = JsonStream(file, path)
        stream.seek(rows)
        start = stream.peek()
    if start == "[":
        yield from _array(path, encoding, rows)
    elif start == "{":
        yield from _keyed(path, encoding, rows)
    else:
        raise UserError(f"{path}: data.rows={rows} is {shown(start)}..., not a list of rows")


def _values(path: Path, encoding: str | None) -> Iterator[Record | BadRow]:
    """The rows of a file of several objects, each on one or more lines."""
    with open_text(path, encoding) as file:
        stream = JsonStream(file, path)
        number = 0
        while stream.peek(end=True):
            number += 1
            yield _record(f"{path.name}[{number}]", stream.value())


def _keyed(path: Path, encoding: str | None, key: str) -> Iterator[Record | BadRow]:
    """Rows of {image name: row, caption or captions}; the name becomes the cell `image` (and `id`) unless the row has its own."""
    with open_text(path, encoding) as file:
        stream = JsonStream(file, path)
        stream.seek(key)
        for name in stream.object_keys():
            value = stream.value()
            yield f"{path.name}[{shown(name, 60)}]", {"id": name, "image": name, **(value if isinstance(value, dict) else {"text": value})}


def _whole(path: Path, encoding: str | None, note: Callable[[str], None]) -> Iterator[Record | BadRow]:
    """Rows of an object that holds columns (lists, or pandas' {row: cell}), or that is the only row."""
    with open_text(path, encoding) as file:
        value: dict[str, Any] = JsonStream(file, path).value()
    cells = list(value.values())
    if path.suffix.lower() in _LINES and any(map(_is_row_key, value)):  # the only line of a file of lines is a row, whatever its cells hold
        records = [value]
    elif isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):  # pandas, orient="split"
        records = [dict(zip(value["columns"], row)) for row in value["data"]]
    elif len(cells) > 1 and all(isinstance(c, list) and c and not isinstance(c[0], (dict, list)) for c in cells) and len({len(c) for c in cells}) == 1:
        note(f"{path.name}: its lists are read as columns, an element a row")
        records = [dict(zip(value, row)) for row in zip(*cells)]
    elif cells and cells[0] and all(isinstance(c, dict) and not _is_turn(c) for c in cells) and len({tuple(c) for c in cells}) == 1:  # pandas, orient="columns"
        records = [{name: column[row] for name, column in value.items()} for row in cells[0]]
    else:
        records = [value]
    yield from ((f"{path.name}[{number}]", record) for number, record in enumerate(records, 1))


def _layout(path: Path, encoding: str | None) -> tuple[list[str], bool, bool]:
    """(keys, also `outer.inner`, of lists of objects; whether the object's keys name images or rows; whether more objects follow)."""
    arrays: list[str] = []
    inner: list[str] = []
    count = image_names = objects = images = row_keys = 0
    columns: set[tuple[str, ...]] = set()
    with open_text(path, encoding) as file:
        stream = JsonStream(file, path)
        for key in stream.object_keys():
            count += 1
            image_names += _IMAGE_NAME.fullmatch(key) is not None
            row_keys += _is_row_key(key)
            if stream.peek() == "[":
                first, others = None, 0
                for number, element in enumerate(stream.elements()):
                    first = element if number == 0 else first
                    others += not isinstance(element, dict)
                cells = key in _PARTS_OF_A_ROW or others > 0 and key.lower() in _IMAGE_COLUMNS
                if isinstance(first, dict) and not _is_turn(first) and not cells:
                    arrays.append(key)
                else:
                    images += _names_image(key, [first])
                continue
            value = stream.value()
            images += _names_image(key, value)
            if isinstance(value, dict):
                objects += 1
                columns.add(tuple(value)[:3])
                inner += [f"{key}.{k}" for k, v in value.items() if isinstance(v, list) and v and isinstance(v[0], dict) and not _is_turn(v[0])]
        more = bool(stream.peek(end=True))
    by_position = len(columns) == 1 and "0" in next(iter(columns), ())  # pandas' columns are objects, too: {"0": ..., "1": ...}
    keyed = count > 0 and (image_names == count or count > 1 and objects == count and not row_keys and not by_position and not arrays and not inner)
    if row_keys and not more and path.suffix.lower() in _LINES:
        return [], False, False
    return [] if images else arrays or inner, keyed, more


def _is_row_key(key: str) -> bool:
    """Whether a key is one that rows have."""
    return key in _PARTS_OF_A_ROW or key.lower() in _IMAGE_COLUMNS


def _is_turn(value: Mapping[str, Any]) -> bool:
    """Whether an object is a turn or an image of a row, not a row."""
    return "role" in value or "from" in value or {"bytes", "path"} == set(value)


def _names_image(key: str, value: Any) -> bool:
    """Whether a key and its value show that the object is a row."""
    return key.lower() in _IMAGE_COLUMNS and isinstance(value, (str, list)) or isinstance(value, str) and _IMAGE_NAME.fullmatch(value) is not None


class JsonStream:
    """Parses a JSON text value by value; only a chunk and one value are in memory. Raises UserError where the text is not JSON."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self.file, self.path = file, path
        self.text, self.position, self.done = "", 0, 0
        self.decoder = json.JSONDecoder()

    @property
    def read_so_far(self) -> int:
        """The number of characters parsed."""
        return self.done + self.position

    def _more(self) -> bool:
        chunk = self.file.read(max(CHUNK, len(self.text) - self.position))  # doubled each time, so that a long element is not rescanned often
        self.done += self.position
        self.text, self.position = self.text[self.position :] + chunk, 0
        return bool(chunk)

    def peek(self, end: bool = False) -> str:
        """The next character that is not white space; "" at the end of the text if `end` is allowed."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n\ufeff":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self._more():
                if end:
                    return ""
                raise UserError(f"{self.path}: the JSON ends early, after {self.read_so_far} characters")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                element, end = self.decoder.raw_decode(self.text, self.position)
            except (ValueError, RecursionError) as error:
                if len(self.text) - self.position > LONGEST or not self._more():
                    raise UserError(f"{self.path}: broken JSON near character {self.read_so_far}: {error}") from None
                continue
            if end == len(self.text) and self._more():  # a number may continue in the next chunk
                continue
            self.position = end
            return element

    def expect(self, characters: str) -> str:
        found = self.peek()
        if found not in characters:
            raise UserError(f"{self.path}: broken JSON near character {self.read_so_far}: {found!r} instead of {' or '.join(characters)}")
        self.position += 1
        return found

    def elements(self) -> Iterator[Any]:
        """The elements of the array that starts here."""
        self.expect("[")
        if self.peek() == "]":
            self.position += 1
            return
        while True:
            yield self.value()
            if self.expect(",]") == "]":
                return

    def object_keys(self) -> Iterator[str]:
        """The keys of the object that starts here; the caller reads each value before it asks for the next key."""
        self.expect("{")
        if self.peek() == "}":
            self.position += 1
            return
        while True:
            name = self.value()
            if not isinstance(name, str):
                raise UserError(f"{self.path}: broken JSON near character {self.read_so_far}: a key is not text")
            self.expect(":")
            yield name
            if self.expect(",}") == "}":
                return

    def seek(self, path: str) -> None:
        """Move to the value under a key, or under `outer.inner`. Raises UserError with the nearest key."""
        for part in filter(None, path.split(".")):
            names = []
            if self.peek() != "{":
                raise UserError(f"{self.path}: has no key {part!r}, it holds a list of rows; drop data.rows={path}")
            for name in self.object_keys():
                names.append(name)
                if name == part:
                    break
                self.skip()
            else:
                raise UserError(f"{self.path}: has no key {part!r}.{nearest(part, names)} It has: {listed(names)}.")

    def skip(self) -> None:
        """Skip one value; the elements of an array are read one at a time."""
        if self.peek() == "[":
            for _ in self.elements():
                pass
        else:
            self.value()


def json_array(path: Path, key: str | None = None, encoding: str | None = None) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON array with the number of characters read so far; of the array under `key` if it is given.

    A file of several arrays in sequence is read to its end. Raises UserError where the text is not JSON.
    """
    with open_text(path, encoding) as file:
        stream = JsonStream(file, path)
        if key is not None:
            stream.seek(key)
        while True:
            for element in stream.elements():
                yield element, stream.read_so_far
            if key is not None or not stream.peek(end=True):
                return
