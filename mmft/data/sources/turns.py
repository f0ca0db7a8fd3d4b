"""Convert conversations of all common formats to messages and a list of their images in order."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..sample import BadRow, ImageSize, Message, Part, Row, image_parts, text_of, text_part, user_turn
from ..wording import shown
from .cells import UnusableRow, image_address, image_cells, pairs_of, plain_text, structure_in_text, texts
from .objects import place_objects, read_objects
from .preferences import record_answers

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system", "tool": "tool",
         "function_call": "assistant", "observation": "tool"}  # fmt: skip
# A question and its answer in one object: the_cauldron, VQA sets, alpaca, TRL.
PAIRS = (("user", "assistant"), ("question", "answer"), ("q", "a"), ("human", "gpt"), ("instruction", "output"), ("prompt", "completion"),
         ("prompt", "response"), ("query", "response"), ("question", "answers"))  # fmt: skip
PLACEHOLDER = "<image>"
SIZE_KEYS = ("min_pixels", "max_pixels", "resized_height", "resized_width")  # that qwen-vl-utils reads from an image part
POSITIONS = ("kept", "first", "added")
PLACED_NOTE = "have images but no <image> in their text; the images stand before the first user turn"
# Qwen's text form of an image: a path between the two tokens, or pad tokens for the next image of the row
_QWEN = re.compile(r"<\|vision_start\|>(.*?)<\|vision_end\|>", re.DOTALL)
_QWEN_PAD = re.compile(r"(<\|image_pad\|>)+")


@dataclass
class Conversation:
    """messages; images in the order of their image parts; references: all answers of the last turn, if it has several; notes: see Row."""

    messages: list[Message]
    images: list[str | bytes]
    references: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def conversation_row(turns: Any, images: Any, where: str, *, id: str | None = None,
                     split: str | None = None, position: str = "kept", roles: Mapping[str, str] = ROLES,
                     role_key: str | None = None, text_key: str | None = None, system: str | None = None,
                     objects: Any = None, boxes: str = "xyxy") -> Row | BadRow:
    """A row from `turns` (see read_turns) and the row's `images`: None, one, or a list of paths, bytes or {bytes, path}.

    objects: its boxes and points, `boxes` the form of their numbers (objects.py).
    """
    try:
        found = read_objects(objects, boxes)
        read = read_turns(turns, image_cells(images), position=position, roles=roles, role_key=role_key, text_key=text_key)
        place_objects(read.messages, found)
    except UnusableRow as error:
        return BadRow(where, str(error), id)
    if system:
        read.messages.insert(0, {"role": "system", "content": [text_part(system)]})
    return Row(read.images, read.messages, read.references, id, split, where, tuple(read.notes), found.unit)


def record_row(values: Mapping[str, Any], turns: Any, where: str, position: str, boxes: str) -> Row | BadRow:
    """The row of a record with `image` or `images`, and optionally `id`, `split`, `objects`, `weight`, a rejected answer and a label; see conversation_row."""
    name = None if values.get("id") is None else str(values["id"])
    images = values.get("images") if values.get("image") is None else values["image"]
    row = conversation_row(turns, images, where, id=name, split=values.get("split"), position=position, objects=values.get("objects"), boxes=boxes)
    if isinstance(row, Row):
        try:
            row.rejected, row.label = record_answers(values, turns)
        except UnusableRow as error:
            return BadRow(where, str(error), name)
    return weigh(row, values.get("weight"))


def read_turns(turns: Any, images: list[str | bytes], *, position: str = "kept", roles: Mapping[str, str] = ROLES,
               role_key: str | None = None, text_key: str | None = None) -> Conversation:
    """A conversation as messages, and its images in the order of their image parts.

    A turn is {from|role: ..., value|content: ...} (or has the given keys), or a pair of question and answer; its content is a
    string or a list of parts. `turns` may be written as JSON or Python text. In a user's string, `<image>` is the position of
    the row's next image and `<|vision_start|>path<|vision_end|>` that of a file; in a row without `images`, `<image>` is plain
    text. One newline next to a placeholder is removed with it. Images without any placeholder stand before the first user turn.
    `loss: false` or `weight: 0` marks an answer that is not trained, another `weight` multiplies its loss; `reasoning_content` is kept.
    position: `kept` leaves images where the text has them, `first` moves them before the text of their turn, `added` is `kept`
    without a note on rows without placeholders. Raises UnusableRow.
    """
    turns = structure_in_text(turns)
    if not isinstance(turns, (list, tuple)) or not turns:
        raise UnusableRow("no answer: the row has no turns")
    ordered: list[str | bytes] = []
    queue = list(images)
    missing = 0
    messages: list[Message] = []
    for number, (role, content, turn) in enumerate(_split_turns(turns, roles, role_key, text_key), 1):
        pieces = _split_parts(content, number) if isinstance(content, (list, tuple)) else _split_text(content, role, bool(images), number)
        parts: list[Part] = []
        for piece in pieces:
            if isinstance(piece, str):
                parts.append(text_part(piece))
                continue
            parts.append({"type": "image", **piece.size})
            if piece.image is not None:
                ordered.append(piece.image)
            elif queue:
                ordered.append(queue.pop(0))
            else:
                missing += 1
        messages.append(_message(role, parts, turn, number))
    read = Conversation(messages, ordered, _answers(turns[-1]))
    if queue and len(queue) == len(images) and not missing:  # no placeholder
        first = next((m for m in messages if m["role"] == "user"), None)
        if ordered and all(image in ordered for image in queue):
            queue = []  # the text names the same images
        elif not ordered and first is not None:
            first["content"][:0] = image_parts(len(queue))
            read.images, queue = queue, []
            read.notes += [PLACED_NOTE] * (position != "added")
    if queue or missing:
        raise UnusableRow(_count_problem(len(images) - len(queue) + missing, len(images)))
    if position == "first":
        for message in messages:
            message["content"] = _images_first(message["content"])
    return read


def prompt_turn(images: Sequence[object], text: str | None, shared: bool = False, position: str = "kept") -> Message:
    """The user turn of a prompt: the images stand where `<image>` is, else before the text.

    shared: the prompt belongs to rows with different numbers of images; one `<image>` is the position of all of them.
    Raises UnusableRow if the number of placeholders is not that of the images.
    """
    if not text or PLACEHOLDER not in text or not images:  # in a row without images, <image> is plain text
        return user_turn(len(images), text)
    if shared and text.count(PLACEHOLDER) == 1:
        text = text.replace(PLACEHOLDER, PLACEHOLDER * len(images))
    return read_turns([{"role": "user", "content": text}], [""] * len(images), position=position).messages[0]


def _count_problem(placeholders: int, images: int) -> str:
    return (f"image count: {placeholders} placeholder{'s' * (placeholders != 1)} in the text, {images} image{'s' * (images != 1)};"
            " write <image> once for each image, or not at all")  # fmt: skip


def _message(role: str, parts: list[Part], turn: Mapping[str, Any], number: int) -> Message:
    message: Message = {"role": role, "content": parts}
    if role == "assistant":
        reasoning = turn.get("reasoning_content")
        if reasoning:
            message["reasoning_content"] = plain_text(reasoning, f"reasoning_content of turn {number}")
        loss, weight = turn.get("loss"), loss_weight(turn.get("weight"), f"turn {number}")
        if loss is not None and loss not in (0, 1):
            raise UnusableRow(f"broken turn: turn {number} has loss={shown(loss)}; it must be true or false")
        if loss is not None and not loss or weight == 0:
            message["loss"] = False
        elif weight != 1:
            message["weight"] = weight
    return message


def loss_weight(value: Any, name: str) -> float:
    """A loss weight as a number; 1 where none is given. name: of its place. Raises UnusableRow."""
    if value is None or isinstance(value, str) and not value.strip():
        return 1.0
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise UnusableRow(f"broken weight: {name} has weight={shown(value)}; it must be a number, 0 or above")
    return number


def weigh(row: Row | BadRow, value: Any) -> Row | BadRow:
    """The row with the loss weights of its answers multiplied by the row's own weight."""
    if isinstance(row, BadRow):
        return row
    try:
        weight = loss_weight(value, "the row")
    except UnusableRow as error:
        return BadRow(row.where, str(error), row.id)
    if weight == 0:
        return BadRow(row.where, "no weight: its weight is 0, so nothing of it would be trained; leave such rows out of the data", row.id)
    for message in row.messages:
        if weight != 1 and message["role"] == "assistant" and message.get("loss") is not False:
            message["weight"] = weight * message.get("weight", 1.0)
    return row


def _split_turns(turns: Sequence[Any], roles: Mapping[str, str], role_key: str | None,
                 text_key: str | None) -> Iterable[tuple[str, Any, Mapping[str, Any]]]:
    """(role, content, the turn as read) of each turn; a pair of question and answer is two turns. Raises UnusableRow."""
    number = 0
    for turn in turns:
        number += 1
        if isinstance(turn, (list, tuple)) and len(turn) == 2 and all(isinstance(t, str) for t in turn):
            pair: tuple[Any, Any] | None = (turn[0], turn[1])
        elif not isinstance(turn, Mapping):
            raise UnusableRow(f"broken turn: turn {number} is not an object")
        else:
            pair = None if role_key or "role" in turn or "from" in turn else pairs_of(turn, PAIRS)
        if pair is not None:
            answer = next(iter(texts(pair[1], f"turn {number + 1}")), "") if isinstance(pair[1], (list, tuple)) else pair[1]
            number += 1
            yield from (("user", pair[0], {}), ("assistant", answer, {}))
            continue
        name = turn.get(role_key) if role_key else turn.get("from", turn.get("role"))
        content = turn.get(text_key) if text_key else turn.get("value", turn.get("content"))
        yield roles.get(name, name) if isinstance(name, str) else shown(name), content, turn


def _answers(turn: Any) -> list[str]:
    """The answers of a last turn that is a question with a list of answers."""
    pair = pairs_of(turn, PAIRS) if isinstance(turn, Mapping) and "role" not in turn and "from" not in turn else None
    return texts(pair[1], "the last turn") if pair is not None and isinstance(pair[1], (list, tuple)) else []


def _images_first(parts: list[Part]) -> list[Part]:
    images: list[Part] = [p for p in parts if p["type"] == "image"]
    text = text_of(parts).strip()
    if not images:
        return parts
    return images + ([text_part(text)] if text else [])


@dataclass
class _Image:
    """An image in the content of a turn; without `image`, the next of the row's images. size: its SIZE_KEYS."""

    image: str | bytes | None = None
    size: ImageSize = field(default_factory=dict)  # type: ignore[assignment]


def _split_text(content: Any, role: str, has_images: bool, number: int) -> list[str | _Image]:
    """The texts and images of a turn's string; only user and tool turns can hold images. Raises UnusableRow for a content that is not text."""
    if content is None:
        return []
    text = plain_text(content, f"turn {number}")
    if role not in ("user", "tool"):
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
    worded = [i for i, p in enumerate(pieces) if isinstance(p, str) and p.strip()]
    if worded and (len(worded) == 1 or worded[0] == 0):
        pieces[worded[0]] = str(pieces[worded[0]]).lstrip()
    if worded and (len(worded) == 1 or worded[-1] == len(pieces) - 1):
        pieces[worded[-1]] = str(pieces[worded[-1]]).rstrip()
    return [p for p in pieces if not isinstance(p, str) or p.strip()]


def _split_parts(content: Sequence[Any], number: int) -> list[str | _Image]:
    """The texts and images of OpenAI-style, Anthropic-style and transformers-style content parts. Raises UnusableRow."""
    pieces: list[str | _Image] = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, Mapping):
            raise UnusableRow(f"broken turn: turn {number} holds a part that is not an object")
        kind = part.get("type") or ("text" if isinstance(part.get("text"), str) else "image" if "image" in part or "image_url" in part else None)
        if kind in ("text", "input_text", "output_text"):
            pieces.append("" if part.get("text") is None else plain_text(part["text"], f"turn {number}"))
        elif kind in ("image", "image_url", "input_image"):
            source = part.get("source")  # {"type": "base64", "data": ...}, or {"type": "url", "url": ...}
            value = {"base64": source.get("data"), "url": source.get("url")} if isinstance(source, Mapping) else next(
                (part[k] for k in ("image", "image_url", "url", "path", "base64") if part.get(k) is not None), None)  # fmt: skip
            cells = image_cells(value)
            pieces.append(_Image(cells[0] if cells else None, _size(part, number)))
        else:
            raise UnusableRow(f"broken turn: turn {number} holds a part of type {shown(kind)!r}; text, image and image_url can be used")
    return pieces


def _size(part: Mapping[str, Any], number: int) -> ImageSize:
    """The size keys of an image part. Raises UnusableRow for a value that is not a number of pixels."""
    size: dict[str, int] = {}
    for key in SIZE_KEYS:
        value = part.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int(value) or value < 1:
            raise UnusableRow(f"broken turn: turn {number} has {key}={shown(value)}; it must be a number of pixels")
        size[key] = int(value)
    return size  # type: ignore[return-value]
