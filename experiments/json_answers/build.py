"""Draw scenes whose answer is a JSON object, alone and with captions among them.

    python build.py FOLDER      writes FOLDER/json.jsonl, FOLDER/mixed.jsonl, FOLDER/schema.json and the pictures they name
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from random import Random

from mmft.data.sources.drawing import COLORS, KINDS, PLACES, draw, random_scene
from mmft.data.sources.scenes import Scenes

TRAIN, HELD_OUT, CAPTIONS = 1280, 128, 320
PROMPT = "List the shapes as JSON."
SCHEMA = {
    "type": "object", "required": ["shapes"], "additionalProperties": False,
    "properties": {"shapes": {"type": "array", "items": {
        "type": "object", "required": ["kind", "color", "place"], "additionalProperties": False,
        "properties": {"kind": {"enum": list(KINDS)}, "color": {"enum": list(COLORS)}, "place": {"enum": [place for row in PLACES for place in row]}},
    }}},
}  # fmt: skip


def main(folder: Path) -> None:
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(TRAIN + HELD_OUT):
        scene = random_scene(Random(f"json/{number}"), 168, 1, 3)
        name = f"pictures/json-{number:05d}.png"
        draw(scene).save(folder / name)
        shapes = [{"kind": item.kind, "color": item.color, "place": item.place} for item in scene.items]
        answer = json.dumps({"shapes": shapes}, separators=(",", ":"))
        rows.append({"id": f"json-{number:05d}", "image": name, "prompt": PROMPT, "text": answer, "split": "train" if number < TRAIN else "validation"})
    captions = []
    for row in itertools.islice(Scenes(captions=1.0, pictures=CAPTIONS, seed=1).read(), CAPTIONS):
        name = f"pictures/{row.id}.png"
        (folder / name).write_bytes(row.images[0])
        prompt, answer = (message["content"][-1]["text"] for message in row.messages)
        captions.append({"id": row.id, "image": name, "prompt": prompt, "text": answer, "split": "train"})
    for file, lines in (("json", rows), ("mixed", [*rows, *captions])):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "schema.json").write_text(json.dumps(SCHEMA, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
