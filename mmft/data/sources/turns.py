"""Convert conversations of all common formats to messages and a list of their images in order."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.request import url2pathname

from ..sample import BadRow, Message, Part, Row, image_parts, text_of, text_part

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
POSITIONS = ("kept", "first", "added")
# Qwen's text form of an image: a path between the two tokens, or pad tokens for the next image of the row
_QWEN = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
_QWEN_PAD = re.compile(r"(<\|image_pad\|>)+")


class TurnError(ValueError):
    """A conversation that cannot be read; the text is `kind: detail`."""


def conversation_row(record: Mapping[str, Any], turns: Any, images: Any, where: str, *, id: str | None = None,
                     split: str | None = None, position: str = "kept", roles: Mapping[str, str] = ROLES,
                     role_key: str | None = None, text_key: str | None = None, system: str | None = None) -> Row | BadRow:
    """A row from `turns` (see read_turns) and the row's `images`: None, one, or a list of paths, bytes or {bytes, path}."""
    try:
        given = image_cells(images)
        messages, ordered = read_turns(turns, given, position=position, roles=roles, role_key=role_key, text_key=text_key)
    except TurnError as error:
        return BadRow(where, str(error), id)
    if system:
        messages.insert(0, {"role": "system", "content": [text_part(system)]})
    return Row(ordered, messages, [], id, split, where)


def image_cells(value: Any) -> list[str | bytes]:
    """The images in one cell of a table, as paths or encoded bytes. Raises TurnError."""
    if value is None or value == "":
        return []
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in (image_cells(item) or [""])]
    if isinstance(value, Mapping):  # an image as stored by datasets and in parquet files
        if value.get("bytes") is not None:
            return [_bytes(value["bytes"])]
        return image_cells(value.get("path") or value.get("url"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [bytes(value)]
    if isinstance(value, str):
        return [image_address(value)]
    if hasattr(value, "save") and hasattr(value, "mode"):  # a Pillow image
        import io

        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return [buffer.getvalue()]
    raise TurnError(f"missing image: a {type(value).__name__} is not a path or the bytes of an image")


def _bytes(value: Any) -> bytes:
    """The bytes of an image file, also from JSON's list of numbers. Raises TurnError."""
    byte_list = isinstance(value, (list, tuple)) and all(isinstance(n, int) and 0 <= n < 256 for n in value)
    if not byte_list and not isinstance(value, (bytes, bytearray, memoryview)):  # bytes(10**12) would be a terabyte of zeros
        raise TurnError(f"unreadable image: its bytes are a {type(value).__name__}")
    return bytes(value)


def image_address(text: str) -> str | bytes:
    """The bytes of a data: URI, the path of a file: URI, or the text unchanged. Other URLs are refused when the image is opened."""
    if text.startswith("data:"):
        head, _, body = text.partition(",")
        try:
            if not head.endswith(";base64"):
                raise ValueError
            return base64.b64decode(body, validate=True)
        except (ValueError, binascii.Error):
            raise TurnError("unreadable image: a data: URI must be base64") from None
    return url2pathname(text[len("file://"):]) if text.startswith("file:///") else text


def read_turns(turns: Any, images: list[str | bytes], *, position: str = "kept", roles: Mapping[str, str] = ROLES,
               role_key: str | None = None, text_key: str | None = None) -> tuple[list[Message], list[str | bytes]]:
    """Messages, and the images in the order of their image parts.

    A turn is {from|role: ..., value|content: ...} (or has the given keys); its content is a string or a list of parts. In a
    user's string, `<image>` is the position of the row's next image and `<|vision_start|>path<|vision_end|>` that of a file;
    in a row without `images`, `<image>` is plain text. One newline next to a placeholder is removed with it.
    position: `kept` leaves images where the text has them, `first` moves them before the text of their turn, `added`
    puts the row's images before the first user turn if no turn has a placeholder. Raises TurnError.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise TurnError("no answer: the row has no turns")
    ordered: list[str | bytes] = []
    queue = list(images)
    missing = 0
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise TurnError(f"broken turn: turn {number} is not an object")
        name = turn.get(role_key) if role_key else turn.get("from", turn.get("role"))
        content = turn.get(text_key) if text_key else turn.get("value", turn.get("content"))
        role = roles.get(name, name) if isinstance(name, str) else str(name)
        pieces = _split_parts(content, number) if isinstance(content, (list, tuple)) else _split_text(content, role, bool(images))
        parts: list[Part] = []
        for piece in pieces:
            if isinstance(piece, str):
                parts.append(text_part(piece))
                continue
            parts += image_parts(1)
            if piece.image is not None:
                ordered.append(piece.image)
            elif queue:
                ordered.append(queue.pop(0))
            else:
                missing += 1
        messages.append({"role": role, "content": parts})
    if position == "added" and images and len(queue) == len(images) and not missing and not ordered:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is not None:
            first["content"][:0] = image_parts(len(queue))
            ordered, queue = queue, []
    if queue or missing:
        placeholders = len(images) - len(queue) + missing
        hint = " (data.image_position=added puts it first)" if placeholders == 0 else ""
        raise TurnError(f"image count: {placeholders} placeholder{'s' * (placeholders != 1)} in the text, "
                        f"{len(images)} image{'s' * (len(images) != 1)}{hint}")
    if position == "first":
        for message in messages:
            message["content"] = _images_first(message["content"])
    return messages, ordered


def _images_first(parts: list[Part]) -> list[Part]:
    images = [p for p in parts if p["type"] == "image"]
    text = text_of(parts).strip()
    if not images:
        return parts
    return images + ([text_part(text)] if text else [])


@dataclass
class _Image:
    """An image in the content of a turn; without `image`, the next of the row's images."""

    image: str | bytes | None = None


def _split_text(content: Any, role: str, has_images: bool) -> list[str | _Image]:
    """The texts and images of a turn's string; only user turns can hold images."""
    if content is None:
        return []
    text = content if isinstance(content, str) else str(content)
    if role != "user":
        return [text]
    pieces: list[str | _Image] = []
    position = 0
    for match in _QWEN.finditer(text):
        inside = match.group(1).strip()
        is_pad = _QWEN_PAD.fullmatch(inside) is not None
        if not inside or is_pad and not has_images:
            continue
        pieces += [*_split_placeholders(text[position:match.start()], has_images), _Image(None if is_pad else image_address(inside))]
        position = match.end()
    return _trim([*pieces, *_split_placeholders(text[position:], has_images)])


def _split_placeholders(text: str, has_images: bool) -> list[str | _Image]:
    if not has_images:
        return [text]
    pieces: list[str | _Image] = []
    for i, between in enumerate(text.split(PLACEHOLDER)):
        pieces += [_Image(), between] if i else [between]
    return pieces


def _trim(pieces: list[str | _Image]) -> list[str | _Image]:
    """In a turn with images, remove one newline next to each image and the white space at both ends of the turn.

    White space between an image and a text that stands between two images is kept.
    """
    if all(isinstance(p, str) for p in pieces):
        return pieces
    for i, piece in enumerate(pieces):
        if not isinstance(piece, str):
            continue
        if i > 0:
            piece = piece.removeprefix("\r\n").removeprefix("\n")
        if i + 1 < len(pieces):
            piece = piece.removesuffix("\n").removesuffix("\r")
        pieces[i] = piece
    texts = [i for i, p in enumerate(pieces) if isinstance(p, str) and p.strip()]
    if texts and (len(texts) == 1 or texts[0] == 0):
        pieces[texts[0]] = str(pieces[texts[0]]).lstrip()
    if texts and (len(texts) == 1 or texts[-1] == len(pieces) - 1):
        pieces[texts[-1]] = str(pieces[texts[-1]]).rstrip()
    return [p for p in pieces if not isinstance(p, str) or p.strip()]


def _split_parts(content: Sequence[Any], number: int) -> list[str | _Image]:
    """The texts and images of OpenAI-style and transformers-style content parts. Raises TurnError."""
    pieces: list[str | _Image] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise TurnError(f"broken turn: turn {number} holds a part that is not an object")
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text"):
            pieces.append(str(part.get("text") or ""))
        elif kind in ("image", "image_url", "input_image"):
            value = next((part[k] for k in ("image", "image_url", "url", "path") if part.get(k) is not None), None)
            if isinstance(value, Mapping) and "url" in value:
                value = value["url"]
            cells = image_cells(value)
            pieces.append(_Image(cells[0] if cells else None))
        else:
            raise TurnError(f"broken turn: turn {number} holds a part of type {kind!r}; text, image and image_url can be used")
    return pieces
