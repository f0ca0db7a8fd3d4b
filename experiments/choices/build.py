"""Pictures of one shape each, in a folder for each kind of shape: python build.py FOLDER [pictures of a kind]"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from random import Random

from mmft.data.sources.drawing import KINDS, draw, random_scene


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 60
    for kind in KINDS:
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for n in range(count):
            scene = random_scene(Random(f"choices/{kind}/{n}"), 168, 1, 1)
            draw(replace(scene, items=(replace(scene.items[0], kind=kind),))).save(folder / kind / f"{n:03d}.png")


if __name__ == "__main__":
    main()
