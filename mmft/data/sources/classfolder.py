"""ClassFolder: a folder of images for each class, without a metadata file; the folder's name is the answer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...common.errors import UserError, nearest
from ..images import SUFFIXES
from ..readers import files
from ..sample import BadRow, Row, assistant_turn
from ..splits import ALIASES
from ..wording import listed
from .base import BaseSource, Stamp
from .turns import prompt_turn


@dataclass(kw_only=True)
class ClassFolder(BaseSource):
    """path: the folder with a folder for each class, or with train, validation and test folders that hold those.

    prompt: the question of every row. labels: answers for folder names, {n01440764: tench}; others are their own answer.
    """

    path: str
    prompt: str | None = "What is in the image?"
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.labels = {str(name): str(label) for name, label in self.labels.items()}

    def classes(self) -> list[tuple[str | None, Path]]:
        """(split or None, folder of a class). Raises UserError if there is none, or if `labels` names one that does not exist."""
        folder = files.existing(self.path, folder=True)
        inner = _folders(folder)
        parts = [f for f in inner if f.name.lower() in ALIASES and _folders(f)]
        others = [f for f in inner if f not in parts and any(_images(f))]
        if parts and others:
            raise UserError(f"data.path={self.path}: holds splits ({listed(f.name for f in parts)}) beside other folders with images"
                            f" ({listed(f.name for f in others)}); move one of them, or name one split: data.path={parts[0]}")
        classes: list[tuple[str | None, Path]] = [(f.name, c) for f in parts for c in _folders(f)] if parts else [(None, c) for c in inner]
        if not any(any(_images(c)) for _, c in classes):
            raise UserError(f"data.path={self.path}: holds no folder of images for each class (FOLDER/CLASS/IMAGE);"
                            " a folder with metadata.csv is read with data=imagefolder")
        names = {c.name for _, c in classes}
        unknown = next((label for label in self.labels if label not in names), None)
        if unknown is not None:
            raise UserError(f"data.labels.{unknown}: there is no such folder.{nearest(unknown, names)} There are: {listed(sorted(names))}.")
        return classes

    def data_root(self) -> Path:
        return Path(self.root or self.path).expanduser()

    def stamp(self) -> Stamp:
        digest, count = hashlib.sha256(), 0
        root = self.data_root().resolve()
        for _, folder in self.classes():
            for image in _images(folder):
                digest.update(f"{image.relative_to(folder.parent).as_posix()}\n".encode("utf-8", "surrogateescape"))
                count += 1
        return {"root": root.as_posix(), "images": count, "names": digest.hexdigest()}

    def total(self) -> int:
        return sum(1 for _, folder in self.classes() for _ in _images(folder))

    def read(self) -> Iterator[Row | BadRow]:
        folder = files.existing(self.path, folder=True)
        others = 0
        for split, place in self.classes():
            others += sum(1 for f in _files(place) if f.suffix.lower() not in SUFFIXES)
            answer = self.labels.get(place.name, place.name)
            for image in _images(place):
                name = image.relative_to(folder).as_posix()
                yield Row([str(image.absolute())], [prompt_turn([name], self.prompt, shared=True), assistant_turn(answer)], [answer], name, split, name)
        others += sum(1 for f in folder.iterdir() if f.is_file() and not f.name.startswith("."))
        if others:
            self.notes.append(f"{others} file{'s' * (others != 1)} that {'are' if others != 1 else 'is'} no image, or in no folder of a class, left out")


def _folders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        yield from (Path(place, name) for name in sorted(names) if not name.startswith("."))


def _images(folder: Path) -> Iterator[Path]:
    return (f for f in _files(folder) if f.suffix.lower() in SUFFIXES)
