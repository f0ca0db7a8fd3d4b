"""Read files of rows one row at a time, as (where, dict): CSV, TSV, JSON, JSONL, parquet and Arrow."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ...common.errors import UserError, nearest
from ..sample import BadRow

CHUNK = 1 << 20  # characters of JSON read at once, which limits memory use
LONGEST = 1 << 28  # characters of one element; after a syntax error early in a file the rest is not read into memory
SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")

Record = tuple[str, dict[str, Any]]  # (where the row stands, its cells as read)


def existing(path: str | Path, key: str = "data.path", folder: bool | None = None) -> Path:
    """`path` if it exists (and, if `folder` is given, is a folder or a file). Raises UserError with the nearest name."""
    place = Path(path).expanduser()
    exists = {True: place.is_dir, False: place.is_file, None: place.exists}[folder]
    if exists():
        return place
    kind = {True: "folder", False: "file", None: "file or folder"}[folder]
    parent = place.parent
    while not parent.is_dir() and parent != parent.parent:
        place, parent = parent, parent.parent
    try:
        names = sorted(p.name for p in parent.iterdir())
    except OSError:
        names = []
    hint = nearest(place.name, names)
    raise UserError(f"{key}={path}: no such {kind} ({parent} has no {place.name}).{hint}" if not place.exists()
                    else f"{key}={path}: is not a {kind}")


def read(path: Path) -> Iterator[Record | BadRow]:
    """The rows of one file, read by its suffix. Raises UserError for an unknown suffix or a file that cannot be parsed at all."""
    readers: dict[str, Callable[[Path], Iterator[Record | BadRow]]] = {
        ".csv": lambda p: _separated(p, ","), ".tsv": lambda p: _separated(p, "\t"), ".json": _json, ".jsonl": _lines,
        ".parquet": _parquet, ".arrow": _arrow,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: rows are read from {', '.join(SUFFIXES)} files")
    try:
        yield from reader(path)
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error.strerror or error).split())}") from None
    except csv.Error as error:
        raise UserError(f"{path}: is not a table of separated values: {error}") from None


def _separated(path: Path, delimiter: str) -> Iterator[Record | BadRow]:
    csv.field_size_limit(1 << 30)  # the default refuses long conversations
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file, delimiter=delimiter)
        header = next(lines, None)
        if not header:
            raise UserError(f"{path}: is empty; its first line must name the columns")
        start = lines.line_num + 1
        for cells in lines:
            where = f"{path.name}:{start}"
            start = lines.line_num + 1
            if not cells:
                continue
            if len(cells) != len(header):
                yield BadRow(where, f"wrong number of cells: {len(cells)}, the header has {len(header)}")
            else:
                yield where, dict(zip(header, cells))


def _lines(path: Path) -> Iterator[Record | BadRow]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _record(f"{path.name}:{number}", line)


def _record(where: str, text: str) -> Record | BadRow:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return BadRow(where, f"broken JSON: {error}")
    return (where, value) if isinstance(value, dict) else BadRow(where, "broken JSON: the row is not an object")


def _json(path: Path) -> Iterator[Record | BadRow]:
    """A JSON array of objects, or JSON Lines in a .json file. Rows are numbered from 1."""
    with path.open(encoding="utf-8-sig") as file:
        head = file.read(CHUNK).lstrip()
    if head.startswith("{"):
        yield from _lines(path)
        return
    if not head.startswith("["):
        raise UserError(f"{path}: must hold a JSON array of objects")
    for number, (value, _) in enumerate(json_array(path), 1):
        where = f"{path.name}[{number}]"
        yield (where, value) if isinstance(value, dict) else BadRow(where, "broken JSON: the row is not an object")


def json_array(path: Path, key: str | None = None) -> Iterator[tuple[Any, int]]:
    """The elements of a JSON array with the number of characters read so far; of the array under `key` if the file is one object.

    Only a chunk and one element are in memory. Raises UserError where the text is not JSON.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        text, position, done = "", 0, 0

        def more() -> bool:
            nonlocal text, position, done
            chunk = file.read(max(CHUNK, len(text) - position))  # doubled each time, so that a long element is not rescanned often
            done += position
            text, position = text[position:] + chunk, 0
            return bool(chunk)

        def peek() -> str:
            nonlocal position
            while True:
                while position < len(text) and text[position] in " \t\r\n":
                    position += 1
                if position < len(text):
                    return text[position]
                if not more():
                    raise UserError(f"{path}: the JSON ends early, after {done + position} characters")

        def value() -> Any:
            nonlocal position
            peek()
            while True:
                try:
                    element, end = decoder.raw_decode(text, position)
                except (ValueError, RecursionError) as error:
                    if len(text) - position > LONGEST or not more():
                        raise UserError(f"{path}: broken JSON near character {done + position}: {error}") from None
                    continue
                if end == len(text) and more():  # a number may continue in the next chunk
                    continue
                position = end
                return element

        def expect(characters: str) -> str:
            nonlocal position
            if peek() not in characters:
                raise UserError(f"{path}: broken JSON near character {done + position}: expected {' or '.join(characters)}")
            position += 1
            return text[position - 1]

        if key is not None:
            _seek_key(key, path, expect, peek, value)
        expect("[")
        if peek() == "]":
            return
        while True:
            yield value(), done + position
            if expect(",]") == "]":
                return


def _seek_key(key: str, path: Path, expect: Callable[[str], str], peek: Callable[[], str], value: Callable[[], Any]) -> None:
    """Move to the value of `key` in the object that the file consists of."""
    expect("{")
    while peek() != "}":
        name = value()
        expect(":")
        if name == key:
            return
        value()
        if expect(",}") == "}":
            break
    raise UserError(f"{path}: has no {key!r}")


def _parquet(path: Path) -> Iterator[Record | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):  # rows may hold the bytes of images
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", record
    except pa.ArrowException as error:
        raise UserError(f"{path}: is not a parquet file: {' '.join(str(error).split())}") from None


def _arrow(path: Path) -> Iterator[Record | BadRow]:
    import pyarrow as pa

    with pa.memory_map(str(path)) as source:
        try:
            try:
                batches = iter(pa.ipc.open_stream(source))
            except pa.ArrowInvalid:
                file = pa.ipc.open_file(source)
                batches = (file.get_batch(i) for i in range(file.num_record_batches))
            number = 0
            for batch in batches:
                # corrupt offsets would crash the process instead of raising
                batch.validate(full=True)
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path.name}:{number}", record
        except pa.ArrowException as error:
            raise UserError(f"{path}: is not an Arrow file: {' '.join(str(error).split())}") from None


def count(files: list[Path]) -> int | None:
    """The approximate number of rows: exact for parquet and JSONL, estimated from the first rows for JSON arrays."""
    totals = [_count(f) for f in files]
    known = [n for n in totals if n is not None]
    return sum(known) if len(known) == len(totals) else None


def _count(path: Path) -> int | None:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            import pyarrow.parquet as pq

            return pq.read_metadata(path).num_rows
        if suffix in (".csv", ".tsv", ".jsonl"):
            with path.open("rb") as file:
                return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        if suffix == ".json":
            read_so_far: tuple[int, int] | None = None
            for n, (_, characters) in enumerate(json_array(path), 1):
                read_so_far = n, characters
                if n == 200:
                    break
            return None if not read_so_far else max(read_so_far[0], read_so_far[0] * path.stat().st_size // max(1, read_so_far[1]))
    except Exception:  # the count only serves the progress bar; the reader reports what is wrong with the file
        pass
    return None
