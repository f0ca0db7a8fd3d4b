"""Pictures of one shape, each with its colour, another colour, and one of the two at random: python build.py FOLDER [pictures]"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from mmft.data.sources.drawing import COLORS, draw, random_scene


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 480
    folder.mkdir(parents=True, exist_ok=True)
    names = list(COLORS)
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for n in range(count):
            rng = Random(f"preferences/{n}")
            scene = random_scene(rng, 168, 1, 1)
            [item] = scene.items
            draw(scene).save(folder / f"{n:03d}.png")
            right, wrong = f"{item.color}.", f"{names[(names.index(item.color) + 1) % len(names)]}."
            row = {"image": f"{n:03d}.png", "question": f"What color is the {item.kind}?", "right": right, "wrong": wrong,
                   "said": rng.choice((right, wrong)), "both": sorted((right, wrong))}  # fmt: skip
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
