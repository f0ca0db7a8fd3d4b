"""Convert the cells of a table to texts and images."""

from __future__ import annotations

import ast
import base64
import binascii
import io
import json
import re
import tokenize
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any
from urllib.request import url2pathname

from ..images import SUFFIXES, is_image
from ..wording import shown

LIST_NOTE = "have a list written as the text of a cell; it is read as a list"
_CAPTION_KEYS = ("raw", "caption", "text", "answer", "sentence")
_IMAGE_KEYS = ("bytes", "base64", "path", "url", "file_name", "filename", "image", "image_url")
LONGEST_PATH = 255  # characters; a longer cell without a dot and a separator of words is base64
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]{16,}={0,2}")
MAY_BE_LIST = ("[", "(", "{", "array")  # starts of texts that may stand for a list or an object; see list_in_text, structure_in_text
_BASE64_STARTS = ("/9j/", "iVBO", "R0lG", "UklG", "Qk", "SUkq", "TU0A", "AAAA")  # of the signatures of image files
# an image cell that image_cells returns unchanged: no list, object, bytes, URI or base64
PLAIN_PATH = re.compile(rf"(?!{'|'.join(map(re.escape, _BASE64_STARTS))})[\w./-]{{1,{LONGEST_PATH}}}").fullmatch


class UnusableRow(ValueError):
    """A row that cannot be read; the text is `kind: detail`."""


def texts(value: Any, name: str = "the cell", optional: bool = False) -> list[str]:
    """The non-empty texts of a cell: a text, a number, a list of these (also written as text), or COCO's {"raw": text}.

    name: of the cell in messages. optional: a NaN is an empty cell. Raises UnusableRow for values that are not text.
    """
    if isinstance(value, str):
        listed = list_in_text(value, name)
        if listed is None:
            return [text] if (text := value.strip()) else []
        return [text for item in listed if (text := item.strip())]
    if value is None or optional and is_nan(value):
        return []
    if isinstance(value, (list, tuple)):
        return [text for item in value if item is not None for text in ([item.strip()] if isinstance(item, str) else texts(item, name, optional)) if text]
    if isinstance(value, Mapping):
        caption = next((value[k] for k in _CAPTION_KEYS if isinstance(value.get(k), str)), None)
        if caption is not None:
            return [caption.strip()] if caption.strip() else []
    return [plain_text(value, name)]


def plain_text(value: Any, name: str) -> str:
    """A text or a number as text. Raises UnusableRow for any other value: NaN, true, an object."""
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float, Decimal)) and not isinstance(value, bool) and not is_nan(value):
        return str(value)
    kind = "NaN" if is_nan(value) else str(value).lower() if isinstance(value, bool) else "an object" if isinstance(value, Mapping) else (
        "a list" if isinstance(value, (list, tuple)) else "nothing" if value is None else f"a {type(value).__name__}")  # fmt: skip
    raise UnusableRow(f"not text: {name} holds {kind}; write it as text" + (' ({"a": 1} as "{\\"a\\": 1}")' if isinstance(value, Mapping) else ""))


def is_nan(value: Any) -> bool:
    return isinstance(value, (float, Decimal)) and value != value


def list_in_text(text: str, name: str = "the cell") -> list[str] | None:
    """The texts of a list that is written as text, in the syntax of JSON, Python or numpy; None for any other text.

    `["a", "b"]`, `['a', 'b']`, `('a', 'b')`, `['a' 'b']`; a list of numbers ([10, 20]) is plain text. Raises UnusableRow for a
    text that begins and ends like such a list but is not one.
    """
    text = text.strip()
    if text[:1] not in ("[", "(", "a"):
        return None
    array = re.fullmatch(r"array\((.*?)(,\s*dtype=[^()]*)?\)", text, re.DOTALL)
    text = array.group(1).strip() if array else text
    if not re.match(r"""[\[(]\s*[rub]?["']""", text) or text[-1] not in "])":
        return None
    try:
        value = json.loads(text)
        return value if all(isinstance(item, str) for item in value) else None
    except (ValueError, RecursionError):
        pass
    try:
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.ENDMARKER)]
        inner = tokens[1:-1]
        strings = [ast.literal_eval(t.string) for t in inner if t.type == tokenize.STRING]
        commas = sum(t.string == "," for t in inner)
        if len(strings) + commas == len(inner) and all(isinstance(s, str) for s in strings) and (text[0] == "[" or commas):
            return strings
    except (ValueError, SyntaxError, tokenize.TokenError, IndexError, MemoryError, RecursionError):
        pass
    if re.fullmatch(r"""\[\s*(["'])[^\[\]]*\1\s*,?\s*\]""", text):
        raise UnusableRow(f"broken list: {name} looks like a list of texts but is not one: {shown(text, 60)}; write it as JSON, or remove the brackets")
    return None


def structure_in_text(value: Any) -> Any:
    """A list or object that is written as text, in the syntax of JSON or Python; any other value unchanged."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{") or value.rstrip()[-1:] not in ("]", "}"):
        return value
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue
    return value


def image_cells(value: Any) -> list[str | bytes]:
    """The images in one cell of a table, as paths or encoded bytes. Raises UnusableRow."""
    if value is None or value == "" or is_nan(value):
        return []
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in (image_cells(item) or [""])]
    if isinstance(value, Mapping):  # an image as stored by datasets and in parquet files, or a content part
        return _image_object(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [_encoded_bytes(value if isinstance(value, bytes) else bytes(value))]
    if isinstance(value, str):
        return _image_text(value)
    if hasattr(value, "save") and hasattr(value, "mode"):  # a Pillow image
        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return [buffer.getvalue()]
    raise UnusableRow(f"missing image: a {type(value).__name__} is not a path or the bytes of an image")


def _image_object(value: Mapping[str, Any]) -> list[str | bytes]:
    key = next((k for k in _IMAGE_KEYS if value.get(k) not in (None, "")), None)
    if key is None:
        return []
    if key not in ("bytes", "base64"):
        return image_cells(value[key])
    content = value[key]
    if isinstance(content, str):
        return [image_address(content) if content.startswith("data:") else _base64(content) or _not_base64()]
    # JSON has a list of numbers; bytes(10**12) would be a terabyte of zeros
    byte_list = isinstance(content, (list, tuple)) and all(isinstance(n, int) and 0 <= n < 256 for n in content)
    if not byte_list and not isinstance(content, (bytes, bytearray, memoryview)):
        raise UnusableRow(f"unreadable image: its bytes are a {type(content).__name__}")
    return [_encoded_bytes(content if isinstance(content, bytes) else bytes(content))]


def _not_base64() -> bytes:
    raise UnusableRow("unreadable image: its bytes are a text that is not base64")


def _encoded_bytes(data: bytes) -> bytes:
    """The bytes of an image file, decoded if they are base64."""
    if is_image(data) or not data[:4].isascii():
        return data
    decoded = _base64(data.decode("ascii", "replace")) if data[:64].isascii() else None
    return decoded if decoded is not None and is_image(decoded) else data


def _image_text(text: str) -> list[str | bytes]:
    start = text.lstrip()[:2]
    if start[:1] in ("[", "(", "{") or text.startswith("array("):
        names = list_in_text(text)
        content = names if names is not None else structure_in_text(text)
        if isinstance(content, (list, Mapping)):
            return image_cells(content)
        parts = [part.strip() for part in text.strip().strip("[]").split(",")]
        if start[:1] == "[" and text.rstrip().endswith("]") and all(part.lower().endswith(SUFFIXES) for part in parts):
            return list(parts)
    if start in ("b'", 'b"'):  # how Python writes bytes
        try:
            content = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError):
            content = None
        if isinstance(content, bytes):
            return [_encoded_bytes(content)]
    if len(text) > LONGEST_PATH and "." not in text or text.lstrip().startswith(_BASE64_STARTS) and len(text) > 40:
        data = _base64(text)
        if data is not None and (is_image(data) or len(text) > LONGEST_PATH):
            return [data]
    return [image_address(text)]


def _base64(text: str) -> bytes | None:
    """The bytes that base64 text stands for, wrapped or not, padded or not, in the standard or the URL alphabet; None for other text."""
    compact = re.sub(r"[\r\n]+[ \t]*", "", text.strip()).replace("\\n", "")
    if not _BASE64.fullmatch(compact):
        return None
    compact = compact.rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except (ValueError, binascii.Error):
        return None


def image_address(text: str) -> str | bytes:
    """The bytes of a data: URI, the path of a file: URI, or the text unchanged. Other URLs are refused when the image is opened."""
    if text.startswith("data:"):
        head, comma, body = text.partition(",")
        data = _base64(body) if comma and head.endswith(";base64") else None
        if data is None:
            raise UnusableRow("unreadable image: a data: URI must be base64 (data:image/png;base64,...)")
        return data
    return url2pathname(text[len("file://"):]) if text.startswith("file:///") else text


def pairs_of(turn: Mapping[str, Any], keys: Sequence[tuple[str, str]]) -> tuple[Any, Any] | None:
    """(question, answer) of an object that has one of the given pairs of keys."""
    return next(((turn[a], turn[b]) for a, b in keys if a in turn and b in turn), None)
