"""Read CSV and TSV files: the delimiter is detected, and an unclosed or stray quote never merges rows.

Python's csv module accepts an unclosed quote: everything up to the next quote, often many rows, becomes one cell.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ...common.errors import UserError
from ..sample import BadRow
from ..wording import listed
from .text import open_text

Record = tuple[str, dict[str, Any]]  # (name of the row in messages, its cells)

DELIMITERS = (",", "\t", ";", "|")
LONGEST_ROW = 1 << 26  # characters; a quote that is never closed must not read a whole file into memory
# What a cell of an image column looks like. If a line inside a quoted cell has one at the place of such a column, it is a row.
_IMAGE_CELL = re.compile(r"""(?ix) \s*"? ( \S[^\n]{0,300} \. (jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|hei[cf]|jp2|ppm|tga) (\#\d+)? | (https?|s3|gs|file)://\S+ | [A-Za-z0-9+/=_-]{32,} ) "?\s*""")


def read_delimited(path: Path, encoding: str | None, quotes: str, tab: bool, note: Callable[[str], None]) -> Iterator[Record | BadRow]:
    """The rows of a file whose first line names the columns. tab: tabs are expected, where quotes are often plain text.

    quotes: `quoting`: "..." encloses a cell; `text`: quotes are characters; `auto`: quoting, but text in a file with tabs
    in which a cell holds a quote that does not enclose it. Raises UserError naming the line of a quote that is not closed.
    """
    with open_text(path, encoding, newline="") as file:
        start = list(islice(file, 1000)) or [""]
    header = start[0]
    if not header.strip():
        raise UserError(f"{path}: is empty; its first line must name the columns")
    delimiter = _delimiter(header, tab)
    # `a.png, "x, y"`: the quotes enclose a cell although a space stands before them; inside a quoted cell, quotes are doubled
    spaced = delimiter != "\t" and any(re.search(rf'{re.escape(delimiter)} +"(?!")', line) for line in start)
    if quotes == "auto" and delimiter == "\t" and (line := _stray_quote(path, encoding)):
        quotes = "text"
        note(f"{path.name}: quotes are read as text, because the quote in line {line} does not enclose a cell (data.quotes=quoting treats them as enclosing cells)")
    with open_text(path, encoding, newline="") as file:
        lines = _Lines(file)
        reader = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=spaced,
                            quoting=csv.QUOTE_NONE if quotes == "text" else csv.QUOTE_MINIMAL)  # fmt: skip
        csv.field_size_limit(LONGEST_ROW)  # the default refuses long conversations
        columns: list[str] = []
        while True:
            lines.start_row()
            try:
                cells = next(reader, None)
            except csv.Error as error:
                if "NUL" in str(error):
                    raise UserError(f"{path}: line {lines.number} holds a NUL byte; the file is damaged, or not a table of separated values") from None
                quoted = _quoted_cells(lines, delimiter)
                raise _quote_error(path, quoted[-1][0] if quoted else lines.first, "is not closed where the cell ends") from None
            if cells is None:
                return
            if not columns:
                columns = _column_names(path, cells)
                continue
            if len(lines.row) > 1:
                _check_merged(path, lines, cells, delimiter)
            where = f"{path.name}:{lines.first}"
            if not cells:
                continue
            if len(cells) != len(columns):
                yield BadRow(where, f"wrong number of cells: {len(cells)}, the header has {len(columns)}"
                             + (f"; a cell that contains {delimiter!r} must be enclosed in quotes" if len(cells) > len(columns) else ""))
            else:
                yield where, dict(zip(columns, cells))


class _Lines:
    """The lines of a file for csv.reader; keeps those of the current row. first: the number of the row's first line."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.number, self.first = file, 0, 1
        self.row: list[str] = []
        self.length = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = next(self.file)
        self.number += 1
        self.row.append(line)
        self.length += len(line)
        if self.length > LONGEST_ROW:
            raise csv.Error("a row is too long")
        return line

    def start_row(self) -> None:
        self.row.clear()
        self.length, self.first = 0, self.number + 1


def _delimiter(header: str, tab: bool) -> str:
    """The delimiter of a header line: the usual one of the format if it occurs, else the most frequent one."""
    usual = "\t" if tab else ","
    outside = re.sub(r'"[^"]*"', "", header)
    return usual if usual in outside else max(DELIMITERS, key=lambda d: (outside.count(d), d == usual))


def _column_names(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    repeated = next((n for i, n in enumerate(names) if n and n in names[:i]), None)
    if repeated is not None:
        raise UserError(f"{path}: line 1 names the column {repeated} twice; rename one of them. Columns: {listed(names)}")
    return names


def _stray_quote(path: Path, encoding: str | None) -> int | None:
    """The first line of a file with tabs in which a quote does not enclose a cell, or None."""
    opened = 0  # the line of a quoted cell that is not closed yet
    with open_text(path, encoding, newline="") as file:
        for number, line in enumerate(file, 1):
            line = line.rstrip("\r\n")
            if opened:
                closing = re.match(r'(?:[^"]|"")*"(?=\t|$)', line)
                if "\t" in (closing.group() if closing else line) or closing is None and '"' in line.replace('""', ""):
                    return opened  # the line is a row by itself
                if closing is None:
                    continue
                line, opened = line[closing.end() + 1 :], 0
            for cell in line.split("\t") if '"' in line else ():
                if opened or '"' in cell and not re.fullmatch(r'"(?:[^"]|"")*"?', cell):
                    return number
                opened = 0 if '"' not in cell or re.fullmatch(r'"(?:[^"]|"")*"', cell) else number
    return opened or None


def _check_merged(path: Path, lines: _Lines, cells: list[str], delimiter: str) -> None:
    """Raises UserError if a line inside a quoted cell is a row by itself: two stray quotes have merged rows."""
    first = lines.row[0].split(delimiter)
    for number, line in enumerate(lines.row[1:], 1):
        inner = line.rstrip("\r\n").split(delimiter)
        if len(inner) >= len(cells) and any(_follows(a, b, number) for a, b in zip(first, inner)):
            number += lines.first
            opening = next((o for o, c in _quoted_cells(lines, delimiter) if o < number and (c is None or number <= c)), None)
            if opening is not None:
                raise _quote_error(path, opening, f"encloses line {number}, which is a row by itself")


def _follows(cell: str, later: str, lines: int) -> bool:
    """Whether `later`, some lines below `cell`, looks like a cell of the same column: both name images, or a running number."""
    if _IMAGE_CELL.fullmatch(cell) and _IMAGE_CELL.fullmatch(later):
        return True
    cell, later = cell.strip(' "'), later.strip(' "')
    return cell.isdecimal() and later.isdecimal() and int(later) == int(cell) + lines


def _quoted_cells(lines: _Lines, delimiter: str) -> list[tuple[int, int | None]]:
    """(line of the opening quote, line of the closing quote) of the current row's cells, up to the first that is not closed (None)."""
    text, line, position, spans = "".join(lines.row), lines.first, 0, []
    cell = re.compile(rf' *"(?P<quoted>(?:[^"]|"")*)(?P<end>"(?=[{re.escape(delimiter)}\r\n]|$))?|[^{re.escape(delimiter)}\n]*')
    while position < len(text) and (match := cell.match(text, position)):
        if match["quoted"] is not None:
            closes = line + match["quoted"].count("\n")
            spans.append((line, closes if match["end"] else None))
            if not match["end"]:
                break
            line = closes
        position = match.end() + 1
        line += text[match.end() : position].count("\n")
    return spans


def _quote_error(path: Path, line: int, problem: str) -> UserError:
    return UserError(f'{path}: line {line}: the quote that opens a cell here {problem}; close it, write a quote inside a quoted cell as "",'
                     " or read all quotes as text with data.quotes=text")  # fmt: skip
