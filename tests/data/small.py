"""Tiny pictures, files and sources for the data tests."""

from __future__ import annotations

import copy
import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mmft.data.prepare import prepare
from mmft.data.prepared import PreparedData
from mmft.data.sample import Row, assistant_turn, user_turn
from mmft.data.sources.base import BaseSource


def png(number: int, side: int = 4) -> bytes:
    """A picture of one colour that `number` decides: equal numbers, equal bytes."""
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (number % 256, number // 256 % 256, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(folder: Path, *names: str) -> Path:
    """A different picture for each name below `folder`."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(number))
    return folder


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_jsonl(path: Path, values: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(v, ensure_ascii=False) + "\n" for v in values), encoding="utf-8")
    return path


def write_csv(path: Path, header: list[str], *rows: list[str], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


def caption_row(image: str | bytes | list, text: str = "a caption", where: str = "rows:1", **more: Any) -> Row:
    images = image if isinstance(image, list) else [image]
    return Row(images, [user_turn(len(images), "Describe."), assistant_turn(text)], where=where, **more)


@dataclass(kw_only=True)
class Given(BaseSource):
    """A source of the rows it is given."""

    given: list = field(default_factory=list)
    where: str | None = None

    def read(self) -> Iterator[Row]:
        yield from copy.deepcopy(self.given)  # prepare may change what it is given

    def stamp(self) -> dict[str, Any]:
        return {}

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "splits": vars(self.splits), "given": repr(self.given)}


def all_rows(prepared: PreparedData) -> list:
    return [s for name in prepared.splits for s in prepared.split(name)]


def make(source: BaseSource, tmp_path: Path) -> PreparedData:
    return prepare(source, tmp_path / "prepared")


def report(prepared: PreparedData) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.path / "report.jsonl").read_text(encoding="utf-8").splitlines()]
