"""Sample: the one format everything after `prepare` reads; Row and Bad: what a source yields."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import open_image

if TYPE_CHECKING:
    from PIL import Image

IMAGE = {"type": "image"}


def text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def user_turn(n_images: int, text: str | None = None) -> dict[str, Any]:
    """A user's message: `n_images` image parts, then the text if there is one."""
    return {"role": "user", "content": [dict(IMAGE) for _ in range(n_images)] + ([text_part(text)] if text else [])}


def assistant_turn(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part(text)]}


def message_text(message: dict[str, Any]) -> str:
    """The text parts of one message, in order, nothing between them."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


@dataclass(frozen=True)
class Sample:
    """One row of a prepared data set.

    images: files below `root`, posix paths, in the order of the image parts of `messages`.
    messages: [{"role": "system|user|assistant", "content": [{"type": "image"} | {"type": "text", "text": str}]}];
        the last one is the assistant's answer.
    references: every caption or answer known, the training answer first.
    sha256: the content hash of each image file, in the order of `images`.
    """

    id: str
    images: tuple[str, ...]
    messages: list[dict[str, Any]]
    references: tuple[str, ...]
    root: str
    sha256: tuple[str, ...] = ()

    @property
    def image_paths(self) -> list[Path]:
        return [Path(self.root, *image.split("/")) for image in self.images]

    def load_images(self) -> list[Image.Image]:
        """The images, RGB. Errors raised: ImageError naming the file, also one that is not what it was when it was prepared."""
        hashes = self.sha256 or (None,) * len(self.images)
        return [open_image(path, sha256=sha256) for path, sha256 in zip(self.image_paths, hashes, strict=True)]

    @cached_property
    def content(self) -> str:
        """sha256 of what shapes this row's tokens: its messages and images."""
        told = json.dumps([self.messages, self.sha256], ensure_ascii=False)
        return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()

    @property
    def answer_text(self) -> str:
        """The text of the last message: what the model is to say."""
        return message_text(self.messages[-1])

    @property
    def prompt_text(self) -> str:
        """The text of the message before the answer; empty for a bare caption."""
        return message_text(self.messages[-2]) if len(self.messages) > 1 else ""


@dataclass
class Row:
    """What a source yields for one row it could read; `prepare` checks it.

    images: paths (absolute, or relative to the source's data root) or the encoded bytes of an image file.
    where: names the row for people: `captions.csv:17`.
    """

    images: list[str | bytes]
    messages: list[dict[str, Any]]
    references: list[str] = field(default_factory=list)
    id: str | None = None
    split: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Bad:
    """A row the source could not read. `reason` is `kind: detail`; kinds are counted in the report."""

    where: str
    reason: str
    id: str | None = None
