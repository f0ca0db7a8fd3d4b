"""Data sets in the form that the recipes' presets expect, made of the photos of a COCO folder, where the real ones cannot be had.

    python stand_in.py cc3m COCO_FOLDER OUT              OUT/chat.json and OUT/images_dl, as LLaVA-CC3M-Pretrain-595K has them
    python stand_in.py football COCO_FOLDER COMMAND...   runs COMMAND with a hub on 127.0.0.1 that serves six captioned photos
                                                         under the name of the football set, so that the command is a user's own
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def captioned(coco: Path) -> list[tuple[Path, list[str]]]:
    """(photo, its captions), ordered by file name."""
    known = json.loads(next(coco.glob("captions_*.json")).read_text(encoding="utf-8"))
    said: dict[int, list[str]] = {}
    for row in known["annotations"]:
        said.setdefault(row["image_id"], []).append(row["caption"].strip())
    return [(coco / "images" / i["file_name"], said[i["id"]]) for i in sorted(known["images"], key=lambda i: i["file_name"])]


def cc3m(coco: Path, out: Path) -> None:
    """A row for every caption, the picture before the question in one row and after it in the next, as in the original."""
    (out / "images_dl").mkdir(parents=True)
    rows = []
    for photo, captions in captioned(coco):
        shutil.copy(photo, out / "images_dl")
        for n, caption in enumerate(captions):
            ask = ("<image>\nGive a brief description of the image.", "Render a concise summary of the photo.\n<image>")[n % 2]
            turns = [{"from": "human", "value": ask}, {"from": "gpt", "value": caption}]
            rows.append({"id": f"{photo.stem}-{n}", "image": photo.name, "conversations": turns})
    (out / "chat.json").write_text(json.dumps(rows), encoding="utf-8")
    print(f"{out}: {len(rows)} conversations")


def football(coco: Path, command: list[str]) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))
    from hub import Hub

    rows = [{"image": {"bytes": photo.read_bytes(), "path": photo.name}, "text": captions[0]} for photo, captions in captioned(coco)[:6]]
    features = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    written = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet = io.BytesIO()
    pq.write_table(written, parquet)
    with Hub() as hub, tempfile.TemporaryDirectory() as home:
        hub.add("datasets", "ybelkada/football-dataset", {"data/train-00000-of-00001.parquet": parquet.getvalue(), "README.md": "# stand-in\n"})
        return subprocess.run(command, env={**os.environ, **hub.environment(Path(home))}).returncode


if __name__ == "__main__":
    kind, folder, *rest = sys.argv[1:]
    if kind == "cc3m":
        cc3m(Path(folder), Path(rest[0]))
    else:
        raise SystemExit(football(Path(folder), rest))
