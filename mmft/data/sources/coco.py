"""CocoCaptions: COCO captions from a local COCO folder, from ModelScope or from a copy on the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...common.errors import UserError
from ..readers import files
from ..readers.json_files import json_array
from ..sample import BadRow, Row, Sample, assistant_turn
from .base import BaseSource, Stamp, file_stamp
from .cells import UnusableRow, image_cells
from .coco_captions import caption_table, stored_images, streamed_images
from .columns import CAPTIONS
from .hub import check_hub, load, resolve_revision
from .saved import named_splits
from .turns import prompt_turn

IMAGE_FOLDERS = ("images", "train2014", "val2014", "train2017", "val2017", "images/train2014", "images/val2014",
                 "images/train2017", "images/val2017", ".")


@dataclass(kw_only=True)
class CocoCaptions(BaseSource):
    """path: a COCO folder; null: the data set `dataset` of `hub`. limit counts images.

    captions: `first` (or `group`) gives one row an image with its first caption, `all` one row a caption; the references are always all
    captions of the image. annotations: the captions_*.json (null: searched below path). images: the image folder (null:
    searched). The recipes' coco-2024-dataset.csv and data_vl.json are written beside the prepared rows.
    """

    path: str | None = None
    annotations: str | None = None
    images: str | None = None
    hub: str = "modelscope"
    dataset: str = "modelscope/coco_2014_caption"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    captions: str = "first"
    prompt: str = "COCO Yes:"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_hub(self.hub)
        if self.captions not in CAPTIONS:
            raise UserError(f"data.captions={self.captions}: must be first or group (a row an image) or all (a row a caption)")

    # -- where the files are --

    def annotation_file(self) -> Path:
        folder = files.existing(self.path or "", folder=True)
        if self.annotations:
            given = folder / self.annotations
            return given if given.is_file() else files.existing(self.annotations if Path(self.annotations).is_file() else given, "data.annotations")
        candidates = [p for pattern in ("captions_*.json", "*/captions_*.json", "*/*/captions_*.json") for p in folder.glob(pattern)]
        if not candidates:
            raise UserError(f"data.path={self.path}: holds no captions_*.json (looked two folders deep); name it with data.annotations=...")
        return min(candidates, key=lambda p: ("train" not in p.name, p.name))

    def data_root(self) -> Path | None:
        return Path(self.root or self.path).expanduser() if self.path else None

    def stamp(self) -> Stamp:
        root = self.data_root()
        if root:
            return {"files": [file_stamp(self.annotation_file())], "root": root.resolve().as_posix()}
        self._sha = resolve_revision(self.dataset, self.revision, self.hub)
        return {"hub": self.hub, "dataset": self.dataset, "revision": self._sha}

    def total(self) -> int | None:
        return self.limit if self.captions != "all" else None

    def limited_rows(self) -> Iterator[Row | BadRow]:
        return self.read()  # limit counts images here; read() applies it

    def read(self) -> Iterator[Row | BadRow]:
        return self._local_rows() if self.path else self._hub_rows()

    def _rows_of(self, name: str, image: str | bytes, captions: list[str], where: str) -> Iterator[Row | BadRow]:
        if not captions:
            yield BadRow(where, "empty answer: the image has no caption", name)
            return
        for number, caption in enumerate(captions if self.captions == "all" else captions[:1], 1):
            references = [caption, *(c for c in captions if c != caption)]
            yield Row([image], [prompt_turn([image], self.prompt, shared=True), assistant_turn(caption)], references,
                      name if self.captions != "all" else f"{name}-{number}", None, where)

    # -- a COCO folder --

    def _local_rows(self) -> Iterator[Row | BadRow]:
        file = self.annotation_file()
        folder: Path | None = None
        with caption_table() as captions:
            captions.add((str(a.get("image_id")), a.get("caption")) for a, _ in json_array(file, "annotations"))
            for number, (image, _) in enumerate(json_array(file, "images"), 1):
                if self.limit is not None and number > self.limit:
                    break
                name, where = str(image.get("id")), f"{file.name}[{number}]"
                if not image.get("file_name"):
                    yield BadRow(where, "missing image: the entry has no file_name", name)
                    continue
                folder = folder or image_folder(self.path or "", self.images, image["file_name"])
                yield from self._rows_of(name, str(folder / image["file_name"]), captions.of(name), where)

    # -- a hub --

    def _hub_rows(self) -> Iterator[Row | BadRow]:
        sha = getattr(self, "_sha", None) or self.stamp()["revision"]
        subset = self.subset or ("coco_2014_caption" if self.hub == "modelscope" else None)
        streaming = self.hub == "huggingface" and self.limit is not None
        try:
            loaded = load(self.dataset, self.hub, subset, self.split, sha, streaming)
        except UserError as error:
            if self.hub == "modelscope":
                raise UserError(f"{error}. The pictures of ModelScope's copy lie on a host that no longer answers; use a COCO folder"
                                " (data.path=...) or a hub copy (data.hub=huggingface data.dataset=...)") from None
            raise
        ((_, dataset),) = named_splits(loaded, self.split, self.dataset)
        label = f"{self.dataset}/{self.split}"
        images = streamed_images(dataset, label, self.limit) if streaming and self.limit else stored_images(dataset, label, self.limit)
        for name, cell, captions, where in images:
            try:
                cells = image_cells(cell)
            except UnusableRow as error:
                yield BadRow(where, str(error), name)
                continue
            if len(cells) == 1:
                yield from self._rows_of(name, cells[0], captions, where)
            else:
                yield BadRow(where, f"image count: {len(cells)} images in one caption's row", name)

    # -- the recipes' files --

    def export(self, folder: Path, final: Path, samples: Iterator[Sample]) -> None:
        """Write coco-2024-dataset.csv (image_path, caption) and data_vl.json (conversations), with absolute paths as in the recipes."""
        with (folder / "coco-2024-dataset.csv").open("w", encoding="utf-8", newline="") as table, \
                (folder / "data_vl.json").open("w", encoding="utf-8", newline="\n") as chat:
            rows = csv.writer(table, lineterminator="\n")
            rows.writerow(["image_path", "caption"])
            chat.write("[")
            for number, sample in enumerate(samples, 1):
                root = final if sample.root == folder.resolve().as_posix() else Path(sample.root)
                path = (root / sample.images[0]).as_posix()
                rows.writerow([path, sample.answer_text])
                turns = [{"from": "user", "value": f"{self.prompt} <|vision_start|>{path}<|vision_end|>"},
                         {"from": "assistant", "value": sample.answer_text}]
                text = json.dumps({"id": f"identity_{number}", "conversations": turns}, ensure_ascii=False, indent=2)
                chat.write(("" if number == 1 else ",") + "\n  " + text.replace("\n", "\n  "))
            chat.write("\n]\n")


def image_folder(path: str, images: str | None, first: str) -> Path:
    """The absolute path of the folder with the first image of a COCO folder. images: the folder that the user named. Raises UserError if there is none."""
    base = files.existing(path, folder=True).resolve()
    if images:
        return files.existing(base / images, "data.images", folder=True)
    for name in IMAGE_FOLDERS:
        if (base / name / first).is_file():
            return base / name
    present = next((n for n in IMAGE_FOLDERS[:-1] if (base / n).is_dir()), None)
    if present:  # only the first image may be missing; every missing one is reported by name
        return base / present
    raise UserError(f"data.path={path}: no folder of pictures (looked for {first} in {', '.join(IMAGE_FOLDERS[:5])}); name it with data.images=...")
