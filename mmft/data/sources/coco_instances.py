"""CocoInstances: the boxes of a COCO detection set, a local folder with images and instances_*.json."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError
from ..readers import files
from ..readers.json_files import json_array
from ..sample import BadRow, Row
from .base import BaseSource, Stamp, file_stamp
from .cells import UnusableRow
from .coco import image_folder
from .coco_captions import caption_table
from .objects import place_objects, read_objects
from .turns import prompt_turn


@dataclass(kw_only=True)
class CocoInstances(BaseSource):
    """path: a COCO folder. limit counts images. A row is an image with the list of its labelled boxes; images without a box are left out.

    annotations: the instances_*.json (null: searched below path). images: the image folder (null: searched). Boxes of crowds are no objects
    and are left out.
    """

    path: str
    annotations: str | None = None
    images: str | None = None
    prompt: str = "Find all objects."
    boxes: str = "xywh"

    def annotation_file(self) -> Path:
        folder = files.existing(self.path, folder=True)
        if self.annotations:
            given = folder / self.annotations
            return given if given.is_file() else files.existing(self.annotations, "data.annotations", folder=False)
        found = [p for pattern in ("instances_*.json", "*/instances_*.json", "*/*/instances_*.json") for p in folder.glob(pattern)]
        if not found:
            raise UserError(f"data.path={self.path}: holds no instances_*.json (looked two folders deep); name it with data.annotations=...")
        return min(found, key=lambda p: ("train" not in p.name, p.name))

    def data_root(self) -> Path:
        return Path(self.root or self.path).expanduser()

    def stamp(self) -> Stamp:
        return {"files": [file_stamp(self.annotation_file())], "root": self.data_root().resolve().as_posix()}

    def total(self) -> int | None:
        return self.limit

    def limited_rows(self) -> Iterator[Row | BadRow]:
        return self.read()  # limit counts images here; read() applies it

    def read(self) -> Iterator[Row | BadRow]:
        file = self.annotation_file()
        names = {category.get("id"): category.get("name") for category, _ in json_array(file, "categories")}
        folder: Path | None = None
        rows = empty = 0
        with caption_table() as table:  # the boxes of an image are spread over the file; a table on disk keeps memory flat
            table.add((str(a.get("image_id")), json.dumps({"label": names.get(a.get("category_id")), "box": a.get("bbox"), "id": a.get("id")}))
                      for a, _ in json_array(file, "annotations") if not a.get("iscrowd"))  # fmt: skip
            for number, (image, _) in enumerate(json_array(file, "images"), 1):
                if rows == self.limit:
                    break
                name, where = str(image.get("id")), f"{file.name}[{number}]"
                if not image.get("file_name"):
                    yield BadRow(where, "missing image: the entry has no file_name", name)
                    continue
                folder = folder or image_folder(self.path, self.images, image["file_name"])
                objects = [json.loads(text) for text in table.of(name)]
                if not objects:
                    empty += 1
                    continue
                rows += 1
                path = str(folder / image["file_name"])
                messages = [prompt_turn([path], self.prompt, shared=True)]
                try:
                    place_objects(messages, read_objects(objects, self.boxes))
                except UnusableRow as error:
                    yield BadRow(where, str(error), name)
                    continue
                yield Row([path], messages, [], name, None, where)
        if empty:
            self.notes.append(f"{empty} images without a box are left out")
