"""Open text files in the right encoding: byte order marks are honoured, UTF-8 is the default, others are detected and named."""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import IO

from ...common.errors import UserError
from ..wording import shown

# the UTF-32 marks begin with those of UTF-16
MARKS = ((codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"), (codecs.BOM_UTF8, "utf-8-sig"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
SAMPLE = 1 << 18  # bytes used to guess an encoding


def check_encoding(name: str | None) -> None:
    """Raises UserError unless `name` is a text encoding of Python, or null."""
    try:
        "".encode(name or "utf-8")
    except (LookupError, ValueError, TypeError):
        raise UserError(f"data.encoding={name}: is not an encoding; use one of Python's names, e.g. gbk, gb18030, big5, shift_jis, cp1252, utf-16") from None


def open_text(path: Path, encoding: str | None, newline: str | None = None) -> IO[str]:
    """The file opened for reading as text. encoding: null: by its byte order mark, else UTF-8. Raises UserError for text with NUL bytes."""
    with path.open("rb") as file:
        head = file.read(4096)
    mark = next((name for mark, name in MARKS if head.startswith(mark)), None)
    if encoding is None and mark is None and b"\0" in head:  # UTF-16 without a mark: its ASCII letters would decode as UTF-8
        raise unreadable_text(path, None)
    return path.open(encoding=encoding or mark or "utf-8", newline=newline)


def unreadable_text(path: Path, encoding: str | None) -> UserError:
    """The error for a file that is not text in `encoding` (null: UTF-8): names the line and the encodings that fit."""
    name = encoding or "UTF-8"
    with path.open("rb") as file:
        position, line, part, decoder = 0, 1, b"", codecs.getincrementaldecoder(encoding or "utf-8")()
        for part in iter(lambda: file.read(SAMPLE), b""):
            try:
                decoder.decode(part)
            except UnicodeDecodeError as error:
                line += part[: error.start].count(b"\n")
                break
            position, line = position + len(part), line + part.count(b"\n")
        else:
            part, line = b"", 0
        file.seek(0)
        sample = part if part and b"\0" not in part[:4096] else file.read(SAMPLE)
    where = f"{path}: is not {name} text" + (f" (line {line})" if line else "")
    if encoding is not None and _decodes(path, "utf-8"):
        return UserError(f"{where}; it is UTF-8: drop data.encoding={encoding}")
    guesses = _guesses(sample)
    if not guesses:
        return UserError(f"{where}; give its encoding with data.encoding=NAME, e.g. gbk or cp1252, or save it as UTF-8")
    encoding, preview = guesses[0]
    others = f", or like {', '.join(g for g, _ in guesses[1:3])}" if guesses[1:] else ""
    return UserError(f"{where}; it looks like {encoding} ({preview}){others}: read it with data.encoding={encoding}, or save it as UTF-8")


def _decodes(path: Path, encoding: str) -> bool:
    try:
        with path.open(encoding=encoding) as file:
            return all(True for _ in file)
    except UnicodeError:
        return False


def _guesses(data: bytes) -> list[tuple[str, str]]:
    """(encoding, the first words that are not ASCII) of encodings that decode `data`, the likeliest first."""
    from charset_normalizer import from_bytes

    if b"\0" not in data:
        data = b"\n".join([line for line in data.splitlines() if not line.isascii()][:500])
    matches = list(from_bytes(data))
    runs = [len(run) for run in re.findall(rb"[\x80-\xff]+", data)]
    if b"\0" not in data and max(runs, default=0) <= 3 and 2 * runs.count(1) >= len(runs) > 0:  # accented letters between ASCII ones
        matches = [*from_bytes(data, cp_isolation=["cp1252"]), *(m for m in matches if m.encoding != "cp1252")]
    guesses: list[tuple[str, str]] = []
    for match in matches:
        words = re.search(r"[^\x00-\x7f][^\n,\t]*", str(match))
        if match.encoding not in ("utf_8", "ascii"):
            guesses.append((match.encoding, shown(words.group().strip(), 20) if words else "ASCII letters"))
    # Cyrillic letters decode as half-width Katakana, which texts rarely hold
    return sorted(guesses, key=lambda guess: bool(re.search("[\uff61-\uff9f]{3}", guess[1])))
