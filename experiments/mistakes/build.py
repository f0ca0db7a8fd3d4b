"""A small random BLIP-2 and pictures of one colour each, captioned by it: python build.py FOLDER -> FOLDER/blip2, FOLDER/colours"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))  # small_models.py

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (40, 70, 220), "white": (245, 245, 245)}


def main() -> None:
    import small_models

    folder = Path(sys.argv[1])
    if not (folder / "blip2").is_dir():
        small_models.build("blip2", folder / "blip2")
    pictures = folder / "colours"
    pictures.mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(0), []
    for n in range(96):
        name, colour = list(COLOURS.items())[n % len(COLOURS)]
        shade = tuple(min(255, max(0, c + rng.randint(-20, 20))) for c in colour)
        Image.new("RGB", (56, 56), shade).save(pictures / f"{n:03d}.png")
        lines.append(json.dumps({"file_name": f"{n:03d}.png", "text": f"a {name} picture"}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
