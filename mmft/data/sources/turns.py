"""Conversations of every common shape, as messages and the images they show, in order."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any
from urllib.request import url2pathname

from ..sample import IMAGE, Bad, Row, text_part

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PLACEHOLDER = "<image>"
POSITIONS = ("kept", "first", "added")
# Qwen's text form of an image: a path between the two marks, or pad tokens that stand for the row's next image.
_QWEN = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
_QWEN_PAD = re.compile(r"(<\|image_pad\|>)+")


class TurnError(ValueError):
    """A conversation that cannot be read; the text is `kind: detail`."""


def conversation_row(record: Mapping[str, Any], turns: Any, images: Any, where: str, *, id: str | None = None,
                     split: str | None = None, position: str = "kept", roles: Mapping[str, str] = ROLES,
                     role_key: str | None = None, text_key: str | None = None, system: str | None = None) -> Row | Bad:
    """A row from `turns` (see read_turns) and the row's own `images`: None, one, or a list of paths, bytes or {bytes, path}."""
    try:
        given = image_cells(images)
        messages, shown = read_turns(turns, given, position=position, roles=roles, role_key=role_key, text_key=text_key)
    except TurnError as error:
        return Bad(where, str(error), id)
    if system:
        messages.insert(0, {"role": "system", "content": [text_part(system)]})
    return Row(shown, messages, [], id, split, where)


def image_cells(value: Any) -> list[str | bytes]:
    """The images that one cell of a table holds. Errors raised: TurnError."""
    if value is None or value == "":
        return []
    if isinstance(value, (list, tuple)):
        return [image for item in value for image in (image_cells(item) or [""])]
    if isinstance(value, Mapping):  # datasets' and parquet's form of an image
        if value.get("bytes") is not None:
            return [_bytes(value["bytes"])]
        return image_cells(value.get("path") or value.get("url"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return [bytes(value)]
    if isinstance(value, str):
        return [image_address(value)]
    if hasattr(value, "save") and hasattr(value, "mode"):  # a Pillow picture
        import io

        buffer = io.BytesIO()
        value.save(buffer, "PNG")
        return [buffer.getvalue()]
    raise TurnError(f"missing image: a {type(value).__name__} is not a path or the bytes of an image")


def _bytes(value: Any) -> bytes:
    """The bytes of an image file, also as JSON writes them, a list of numbers. Errors raised: TurnError."""
    whole = isinstance(value, (list, tuple)) and all(isinstance(n, int) and 0 <= n < 256 for n in value)
    if not whole and not isinstance(value, (bytes, bytearray, memoryview)):  # bytes(10**12) would be a terabyte of zeros
        raise TurnError(f"unreadable image: its bytes are a {type(value).__name__}")
    return bytes(value)


def image_address(text: str) -> str | bytes:
    """A path as it is, the bytes of a data: URI, the path of a file: URI. Other URLs are refused when the image is opened."""
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
               role_key: str | None = None, text_key: str | None = None) -> tuple[list[dict[str, Any]], list[str | bytes]]:
    """Messages and the images in the order of their image parts.

    A turn is {from|role: ..., value|content: ...} (or the keys given); its content is a string or a list of parts. In a
    user's string, `<image>` stands for the row's next image and `<|vision_start|>path<|vision_end|>` for that file;
    in a row without images of its own, `<image>` is plain text. The newline next to a placeholder belongs to it.
    position: `kept` leaves images where the text has them, `first` moves them before the text of their turn, `added`
    puts the row's images before the first user turn where no turn has a placeholder.
    Errors raised: TurnError.
    """
    if not isinstance(turns, (list, tuple)) or not turns:
        raise TurnError("no answer: the row has no turns")
    shown: list[str | bytes] = []
    queue = list(images)
    missing = 0
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise TurnError(f"broken turn: turn {number} is not an object")
        word = turn.get(role_key) if role_key else turn.get("from", turn.get("role"))
        content = turn.get(text_key) if text_key else turn.get("value", turn.get("content"))
        role = roles.get(word, word) if isinstance(word, str) else str(word)
        parts = _split_parts(content, number) if isinstance(content, (list, tuple)) else _split_text(content, role, bool(images))
        for i, part in enumerate(parts):
            if part["type"] != "image":
                continue
            if "image" in part:
                shown.append(part["image"])
            elif queue:
                shown.append(queue.pop(0))
            else:
                missing += 1
            parts[i] = dict(IMAGE)
        messages.append({"role": role, "content": parts})
    if position == "added" and images and len(queue) == len(images) and not missing and not shown:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is not None:
            first["content"][:0] = [dict(IMAGE) for _ in queue]
            shown, queue = queue, []
    if queue or missing:
        placeholders = len(images) - len(queue) + missing
        hint = " (data.image_position=added puts it first)" if placeholders == 0 else ""
        raise TurnError(f"image count: {placeholders} placeholder{'s' * (placeholders != 1)} in the text, "
                        f"{len(images)} image{'s' * (len(images) != 1)}{hint}")
    if position == "first":
        for message in messages:
            message["content"] = _images_first(message["content"])
    return messages, shown


def _images_first(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    images = [p for p in parts if p["type"] == "image"]
    text = "".join(p["text"] for p in parts if p["type"] == "text")
    if not images:
        return parts
    return images + ([text_part(text.strip())] if text.strip() else [])


def _split_text(content: Any, role: str, own_images: bool) -> list[dict[str, Any]]:
    """The parts of a turn's string; only a user's is searched for images."""
    if content is None:
        return []
    text = content if isinstance(content, str) else str(content)
    if role != "user":
        return [text_part(text)]
    parts: list[dict[str, Any]] = []
    pieces: list[Any] = []
    position = 0
    for match in _QWEN.finditer(text):
        inside = match.group(1).strip()
        if _QWEN_PAD.fullmatch(inside):
            if not own_images:
                continue
            image: dict[str, Any] = dict(IMAGE)
        elif inside:
            image = {"type": "image", "image": image_address(inside)}
        else:
            continue
        pieces += [text[position:match.start()], image]
        position = match.end()
    pieces.append(text[position:])
    for piece in pieces:
        if isinstance(piece, dict):
            parts.append(piece)
        elif own_images:
            for i, words in enumerate(piece.split(PLACEHOLDER)):
                parts += [dict(IMAGE)] * (i > 0) + [text_part(words)]
        else:
            parts.append(text_part(piece))
    return _trim(parts)


def _trim(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """In a turn that has images, take off one newline next to each and the white space at both ends.

    White space between an image and words that stand between two images is kept.
    """
    if all(p["type"] == "text" for p in parts):
        return parts
    for i, part in enumerate(parts):
        if part["type"] != "text":
            continue
        text = part["text"]
        if i > 0:
            text = text.removeprefix("\r\n").removeprefix("\n")
        if i + 1 < len(parts):
            text = text.removesuffix("\n").removesuffix("\r")
        part["text"] = text
    texts = [p for p in parts if p["type"] == "text" and p["text"].strip()]
    if texts and (len(texts) == 1 or parts[0] is texts[0]):
        texts[0]["text"] = texts[0]["text"].lstrip()
    if texts and (len(texts) == 1 or parts[-1] is texts[-1]):
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    return [p for p in parts if p["type"] == "image" or p["text"].strip()]


def _split_parts(content: Any, number: int) -> list[dict[str, Any]]:
    """OpenAI-style and transformers-style content parts."""
    parts: list[dict[str, Any]] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise TurnError(f"broken turn: turn {number} holds a part that is not an object")
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text"):
            parts.append(text_part(str(part.get("text") or "")))
        elif kind in ("image", "image_url", "input_image"):
            value = next((part[k] for k in ("image", "image_url", "url", "path") if part.get(k) is not None), None)
            if isinstance(value, Mapping) and "url" in value:
                value = value["url"]
            cells = image_cells(value)
            parts.append({"type": "image", "image": cells[0]} if cells else dict(IMAGE))
        else:
            raise TurnError(f"broken turn: turn {number} holds a part of type {kind!r}; text, image and image_url can be used")
    return parts
