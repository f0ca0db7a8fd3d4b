"""Where the values of a binary column lie in a parquet file, so that an image can be read later without the rows around it.

A column chunk is a sequence of pages, each a header (PageHeader in Thrift's compact protocol) and a body, which may be compressed. In a page of PLAIN encoding a
value is its length as 4 bytes, little-endian, then its bytes. https://parquet.apache.org/docs/file-format/data-pages/ and
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from ..images import CODECS, MOST_PAGE, Inside, Page, PlacedBytes

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ColumnChunkMetaData, ParquetFile

DATA, DICTIONARY, DATA_V2 = 0, 2, 3  # PageType
PLAIN, PLAIN_DICTIONARY = 0, 2  # Encoding; a dictionary page of the second is written like one of the first
MOST_HEADER = 1 << 20  # bytes of a page header: statistics may hold two values


class Places:
    """The places of the values of one column of a row group, asked for in the order of its rows."""

    def __init__(self, path: Path, file: ParquetFile, group: int, leaf: int) -> None:
        column = file.schema.column(leaf)
        self._values = _values(path, file.metadata.row_group(group).column(leaf), (column.max_repetition_level > 0, column.max_definition_level > 0))
        self._dictionary: dict[bytes, Inside] = {}
        self._next: tuple[bytes, Inside] | None = None
        self._step()

    def find(self, value: bytes) -> Inside | None:
        """The place of the next value; None if it is in none of the pages that can be read in part."""
        if self._next is not None and self._next[0] == value:
            found = self._next[1]
            self._step()
            return found
        if value in self._dictionary:
            return self._dictionary[value]
        while self._next is not None and self._next[0] in self._dictionary:  # a value that was found in the dictionary is written again behind the dictionary's pages
            self._step()
        return self.find(value) if self._next is not None and self._next[0] == value else None

    def _step(self) -> None:
        """Move to the next value of a data page; those of a dictionary page, which comes first, are kept."""
        for in_dictionary, value, place in self._values:
            if not in_dictionary:
                self._next = value, place
                return
            self._dictionary[value] = place
        self._next = None


def binary_columns(file: ParquetFile) -> dict[str, int]:
    """{name: number of its leaf} of the columns of the schema that hold one binary leaf, by itself or in structs and lists."""
    import pyarrow as pa

    found: dict[str, list[int]] = {}
    for number in range(len(file.schema)):
        leaf = file.schema.column(number)
        if leaf.physical_type == "BYTE_ARRAY" and leaf.logical_type.type == "NONE":
            found.setdefault(leaf.path.partition(".")[0], []).append(number)
    return {name: numbers[0] for name, numbers in found.items() if len(numbers) == 1 and _binary_leaves(file.schema_arrow.field(name).type, pa) == 1}


def _binary_leaves(kind: pa.DataType, pa: Any) -> int:
    """How many leaves of an Arrow type are read as bytes."""
    if pa.types.is_struct(kind):
        return sum(_binary_leaves(kind.field(i).type, pa) for i in range(kind.num_fields))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _binary_leaves(kind.value_type, pa)
    return int(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def placed(cell: Any, places: Places, name: str) -> Any:
    """A cell whose bytes know their place."""
    if isinstance(cell, bytes):
        inside = places.find(cell)
        if inside is None:
            return cell
        value = PlacedBytes(cell)
        value.inside, value.name = inside, name
        return value
    if isinstance(cell, list):
        return [placed(item, places, f"{name}-{n}") for n, item in enumerate(cell)]
    return {key: placed(item, places, name) for key, item in cell.items()} if isinstance(cell, dict) else cell


def _values(path: Path, chunk: ColumnChunkMetaData, levels: tuple[bool, bool]) -> Iterator[tuple[bool, bytes, Inside]]:
    """(whether it stands in a dictionary page, value, place) of the values in PLAIN pages. levels: whether there are repetition and definition levels."""
    if chunk.compression not in CODECS or chunk.file_path:
        return
    start = min(offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset)
    with path.open("rb") as file:
        file.seek(start)
        while file.tell() < start + chunk.total_compressed_size:
            try:
                header = _page_header(file)
                position = file.tell()
                if header.kind in (DATA, DICTIONARY, DATA_V2) and header.unpacked <= MOST_PAGE:
                    body = file.read(header.packed)
                    if header.encoding == PLAIN or header.kind == DICTIONARY and header.encoding == PLAIN_DICTIONARY:
                        yield from _in_page(path, position, body, header, CODECS[chunk.compression], levels)
                elif header.kind != DICTIONARY:
                    return  # too large: what stands behind it cannot be told apart from it
            except (IndexError, KeyError, ValueError, OSError, RecursionError):  # Arrow's own reader says what is wrong with the file
                return
            file.seek(position + header.packed)


def _in_page(path: Path, position: int, body: bytes, header: _Header, codec: str, levels: tuple[bool, bool]) -> Iterator[tuple[bool, bytes, Inside]]:
    import pyarrow as pa

    in_dictionary = header.kind == DICTIONARY
    if header.kind == DATA_V2:  # the levels are not compressed
        position, body = position + header.levels, body[header.levels :]
    unpacked = header.unpacked - header.levels
    plain = not codec or not header.compressed
    data = body if plain else pa.decompress(body, decompressed_size=unpacked, codec=codec, asbytes=True)
    at = 0
    if header.kind == DATA:
        for there in levels:  # repetition and definition levels, each with its length in front
            at += 4 + int.from_bytes(data[at : at + 4], "little") if there else 0
    while at + 4 <= len(data):
        size = int.from_bytes(data[at : at + 4], "little")
        at += 4
        if at + size > len(data):
            return
        inside = Inside(path, position + at, size) if plain else Inside(path, position, size, Page(codec, len(body), unpacked, at))
        yield in_dictionary, data[at : at + size], inside
        at += size


class _Header(NamedTuple):
    """kind, encoding: numbers of PageType and Encoding. packed, unpacked: bytes of the body. levels: bytes before the values of a V2 page."""

    kind: int
    unpacked: int
    packed: int
    encoding: int
    levels: int = 0
    compressed: bool = True


def _page_header(file: IO[bytes]) -> _Header:
    """The header that starts here; the file then stands behind it. Raises IndexError, KeyError or ValueError for anything else."""
    start = file.tell()
    reader = _Thrift(file.read(1 << 12))
    try:
        fields = reader.struct()
    except IndexError:  # statistics hold the smallest and the largest value, which are images
        file.seek(start)
        reader = _Thrift(file.read(MOST_HEADER))
        fields = reader.struct()
    file.seek(start + reader.at)
    kind = fields[1]
    if min(fields[2], fields[3]) < 0:
        raise ValueError("a page of negative size")
    page = fields.get({DATA: 5, DICTIONARY: 7, DATA_V2: 8}.get(kind, 0), {})
    if kind == DATA_V2:
        return _Header(kind, fields[2], fields[3], page[4], page.get(5, 0) + page.get(6, 0), page.get(7, True))
    return _Header(kind, fields[2], fields[3], page.get(2, -1))


class _Thrift:
    """Reads structs in Thrift's compact protocol: {field number: value}. https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md"""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) != 0:
            step, kind = head >> 4, head & 15
            number = number + step if step else self._signed()
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)

    def _value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind in (1, 2, 3):  # in a list, a truth value is a byte
            return self._byte()
        if kind in (7, 8):
            size = 8 if kind == 7 else self._unsigned()
            self.at += size
            if self.at > len(self.data):
                raise IndexError(self.at)
            return self.data[self.at - size : self.at]
        if kind in (9, 10):
            head = self._byte()
            count = self._unsigned() if head >> 4 == 15 else head >> 4
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:
            return self.struct()
        raise KeyError(kind)  # 11, a map: page headers hold none
