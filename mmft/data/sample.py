"""Rows as sources yield them (Row, BadRow) and as every later step reads them (Sample), with the messages they hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from ..common.records import Region
from .images import MAX_PIXELS, open_image

if TYPE_CHECKING:
    from typing import NotRequired, Required  # Python 3.11; in 3.10 only mypy reads them

    from PIL import Image


class TextPart(TypedDict):
    """tokens: the text was written by a box convention, so special tokens in it are read as such (mmft/collators/box_styles.py)."""

    type: Literal["text"]
    text: str
    tokens: NotRequired[bool]


class ImageSize(TypedDict, total=False):
    """The size that a row sets for an image (keys of qwen-vl-utils, in pixels)."""

    min_pixels: int
    max_pixels: int
    resized_height: int
    resized_width: int


class ImagePart(ImageSize):
    """The position of the next image of the row."""

    type: Required[Literal["image"]]


class RefPart(TypedDict):
    """The name of an object in a text with boxes; model families mark it in their own way."""

    type: Literal["ref"]
    text: str


class BoxPart(TypedDict):
    """A box or point at this place of the text."""

    type: Literal["box"]
    region: Region


class ListPart(TypedDict):
    """Boxes or points with their labels, as the list that a model family writes."""

    type: Literal["regions"]
    regions: list[Region]


Part = TextPart | ImagePart | RefPart | BoxPart | ListPart


class Message(TypedDict):
    """One turn. role: `system`, `user`, `assistant` or `tool`. content: texts and image positions in order.

    reasoning_content: what the assistant thinks before its answer. loss: false for an answer that is not trained. weight: of the loss of an
    answer's tokens; 1 where it is absent.
    """

    role: str
    content: list[Part]
    reasoning_content: NotRequired[str]
    loss: NotRequired[bool]
    weight: NotRequired[float]


def text_part(text: str) -> TextPart:
    return {"type": "text", "text": text}


def image_parts(count: int) -> list[Part]:
    return [{"type": "image"} for _ in range(count)]


def user_turn(n_images: int, text: str | None = None) -> Message:
    """A user message: `n_images` image parts, then the text if there is one."""
    return {"role": "user", "content": image_parts(n_images) + ([text_part(text)] if text else [])}


def assistant_turn(text: str) -> Message:
    return {"role": "assistant", "content": [text_part(text)]}


def text_of(parts: Iterable[Part]) -> str:
    """The text parts joined without a separator; boxes as `[left, top, right, bottom]` in pixels of the image file."""
    return "".join(map(_part_text, parts))


def _part_text(part: Part) -> str:
    if part["type"] == "text" or part["type"] == "ref":
        return part["text"]
    if part["type"] == "box":
        return _pixels(part["region"])
    return "; ".join(f"{r['label']} {_pixels(r)}".strip() for r in part["regions"]) if part["type"] == "regions" else ""


def _pixels(region: Region) -> str:
    return f"[{', '.join(f'{v:g}' for v in coordinates(region))}]"


def coordinates(region: Region) -> list[float]:
    """The two numbers of a point or the four of a box."""
    return region["box"] if "box" in region else region["point"]


def regions_of(parts: Iterable[Part]) -> list[Region]:
    """The boxes and points of a message, in order."""
    found: list[Region] = []
    for part in parts:
        if part["type"] == "box":
            found.append(part["region"])
        elif part["type"] == "regions":
            found += part["regions"]
    return found


def has_regions(messages: Iterable[Message]) -> bool:
    for message in messages:
        for part in message["content"]:
            if part["type"] != "text" and part["type"] != "image":
                return True
    return False


def message_text(message: Message) -> str:
    content = message["content"]
    return content[0]["text"] if len(content) == 1 and content[0]["type"] == "text" else text_of(content)


@dataclass(frozen=True)
class Sample:
    """One row of a prepared data set.

    images: files below `root`, posix paths, in the order of the image parts of `messages`.
    messages: the last one is the assistant's answer.
    references: all known captions or answers, the training answer first.
    sha256: the content hash of each image file, in the order of `images`. max_pixels: larger images are refused. source: of a mix, with
    which the id begins (`chat/17`); "" for a single data set.
    choices: the texts of which the answer is one; empty for a free answer. rejected: a worse answer than the last message; "" if there is
    none. label: whether the last message is a good answer; None where that is not said. weight: of its source in a mix
    (data.sources.NAME.loss_weight), by which the loss weights of its answers are multiplied.
    """

    id: str
    images: tuple[str, ...]
    messages: list[Message]
    references: tuple[str, ...]
    root: str
    sha256: tuple[str, ...] = ()
    max_pixels: int = MAX_PIXELS
    source: str = ""
    choices: tuple[str, ...] = ()
    rejected: str = ""
    label: bool | None = None
    weight: float = 1.0

    @property
    def image_paths(self) -> list[Path]:
        return [Path(self.root, *image.split("/")) for image in self.images]

    def load_images(self) -> list[Image.Image]:
        """The images as RGB. Raises ImageError with the file's name, also for a file whose content has changed since preparation."""
        hashes = self.sha256 or (None,) * len(self.images)
        return [open_image(path, self.max_pixels, sha256) for path, sha256 in zip(self.image_paths, hashes, strict=True)]

    @cached_property
    def content(self) -> str:
        """sha256 of what determines this row's tokens: its messages and images."""
        text = json.dumps([self.messages, self.sha256], ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def regions(self) -> list[Region]:
        """The boxes and points that the model is trained to write, in pixels of the image files."""
        return regions_of(self.messages[-1]["content"])

    @property
    def answer_text(self) -> str:
        """The text of the last message, which the model is trained to write."""
        return message_text(self.messages[-1])

    @property
    def prompt_text(self) -> str:
        """The text of the message before the answer; empty for a caption without a prompt."""
        return message_text(self.messages[-2]) if len(self.messages) > 1 else ""


def with_answer(sample: Sample, answer: str | Message) -> Sample:
    """The row with another last message, the only one that carries loss. answer: its text, or the message."""
    earlier: list[Message] = [{**m, "loss": False} if m["role"] == "assistant" else m for m in sample.messages[:-1]]
    return replace(sample, messages=[*earlier, assistant_turn(answer) if isinstance(answer, str) else answer])


@dataclass
class Row:
    """A row that a source could read; `prepare` checks it.

    images: paths (absolute, or relative to the source's data root) or the encoded bytes of an image file.
    where: names the row in messages to the user: `captions.csv:17`. notes: what the user should know about how the row was
    read; `prepare` reports each note once, with the number of rows ("12 rows " + note). boxes_unit: of its boxes, where the row says it
    (mmft/data/regions.py). choices, label: see Sample. rejected: a worse answer; None for a row that has no place for one.
    """

    images: list[str | bytes]
    messages: list[Message]
    references: list[str] = field(default_factory=list)
    id: str | None = None
    split: str | None = None
    where: str = ""
    notes: tuple[str, ...] = ()
    boxes_unit: str | None = None
    choices: list[str] = field(default_factory=list)
    rejected: str | None = None
    label: bool | None = None


class PlainRow(Row):
    """A row of one image file, a prompt or none, and one answer without white space at its ends: what nearly all rows of large tables are.

    Its messages and references are made when they are asked for; preparation does not ask.
    """

    choices: list[str] = ()  # type: ignore[assignment]

    def __init__(self, image: str, prompt: str, answer: str, id: str | None, split: str | None, where: str) -> None:
        self.images, self.prompt, self.answer, self.id, self.split, self.where = [image], prompt, answer, id, split, where

    @cached_property
    def messages(self) -> list[Message]:  # type: ignore[override]
        return [user_turn(1, self.prompt), assistant_turn(self.answer)]

    @cached_property
    def references(self) -> list[str]:  # type: ignore[override]
        return [self.answer]


@dataclass(frozen=True)
class BadRow:
    """A row that the source could not read. reason: `kind: detail`; the report counts rows by kind."""

    where: str
    reason: str
    id: str | None = None
