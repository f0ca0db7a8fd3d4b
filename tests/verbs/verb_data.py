"""Drawn pictures and small helpers for the tests of the verbs."""

import json
import random
from pathlib import Path

QUESTION = "What is this?"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw(folder: Path, n: int, side: int = 56) -> None:
    """n pictures of one shape each, and rows.csv with image, prompt, text."""
    from PIL import Image, ImageDraw

    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(n)
    rows = ["image,prompt,text"]
    for i in range(n):
        picture = Image.new("RGB", (side, side), "white")
        color, shape = rng.choice(["red", "green", "blue"]), rng.choice(["square", "circle"])
        x, y = rng.randrange(side // 2), rng.randrange(side // 2)
        paint = ImageDraw.Draw(picture)
        (paint.rectangle if shape == "square" else paint.ellipse)((x, y, x + side // 3, y + side // 3 + i % 5), fill=color)
        picture.save(folder / f"{i}.png")
        rows.append(f"{i}.png,{QUESTION},a {color} {shape}")
    (folder / "rows.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
