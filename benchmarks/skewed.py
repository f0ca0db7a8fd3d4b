"""Rows of very different length: short and long answers, one or two pictures of several sizes, some rows of text alone.

    python -m benchmarks.skewed OUT [--photos FOLDER] [--rows 32]     write them alone, and print their lengths

Three kinds of answers in the shares of LLaVA-Instruct-150K: 58 000 conversations, 23 000 descriptions, 77 000 explanations. The lengths
within a kind are assumed, not counted in that set: lognormal about the medians below, cut to 5 to 400 words. The fixture's tokenizer makes
about one token of a word.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path
from statistics import NormalDist
from typing import Any

from .fixture import photos

# share in thousands, median words of an answer, spread of its logarithm, questions
KINDS = (
    (58, 22, 0.7, ("What is in the middle?", "Which colours do you see?", "How many people are there, and what do they do?")),
    (23, 130, 0.25, ("Describe this in detail.",)),
    (77, 170, 0.4, ("What could happen next, and why?", "Why might somebody have made this, and what does it say about the place?")),
)
LEAST, MOST = 5, 400  # words of an answer
PICTURES = ((70, 1), (15, 2), (15, 0))  # share of the rows, pictures in each
WIDTHS = (120, 200, 320, 480, 640)  # of the pictures, in pixels; their shape stays
WORDS = [
    "a", "the", "two", "red", "small", "old", "dog", "cat", "boat", "street", "table", "man", "woman", "child", "with", "near", "under",
    "behind", "white", "green", "grass", "train", "window", "house", "tree", "field", "light", "because", "although", "while", "there",
    "here", "stands", "sits", "runs", "looks", "holds", "shows", "water", "sky", "morning", "evening", "people", "market", "slowly",
    "often", "perhaps", "and", "or", "of", "to", "in",
]  # fmt: skip


def lengths(n: int, seed: int = 0) -> list[tuple[int, str]]:
    """(words of the answer, question) of n rows. Kinds come in their shares, each at evenly spaced points of its distribution, then shuffled."""
    draw, found = random.Random(seed), []
    total, counts = sum(kind[0] for kind in KINDS), [0] * len(KINDS)
    for i in range(n):  # the kind that is furthest behind its share
        kind = max(range(len(KINDS)), key=lambda k: KINDS[k][0] / total * (i + 1) - counts[k])
        counts[kind] += 1
    for count, (_, median, spread, questions) in zip(counts, KINDS):
        for i in range(count):
            words = median * math.exp(spread * NormalDist().inv_cdf((i + 0.5) / count))
            found.append((round(min(max(words, LEAST), MOST)), questions[i % len(questions)]))
    draw.shuffle(found)
    return found


def rows(folder: Path | None, out: Path, n: int) -> list[dict[str, Any]]:
    """n rows {image: [paths], prompt, text}, also written to out/rows.jsonl; pictures as `fixture.photos` takes or draws them, resized."""
    from PIL import Image

    found, draw = [], random.Random(1)
    pictures = [out / row["image"] for row in photos(folder, out, n)]
    shares = [count for share, count in PICTURES for _ in range(round(share * n / 100))]
    shares = (shares + [1] * n)[:n]
    draw.shuffle(shares)
    for i, path in enumerate(pictures):
        with Image.open(path) as image:
            width = WIDTHS[i % len(WIDTHS)]
            resized = image.convert("RGB").resize((width, max(round(image.height * width / image.width), 56)))
        resized.save(path, quality=90)
    for i, ((words, question), count) in enumerate(zip(lengths(n), shares)):
        text = " ".join(draw.choices(WORDS, k=words)).capitalize() + "."
        chosen = [pictures[(i + k) % n].relative_to(out).as_posix() for k in range(count)]
        found.append({"image": chosen, "prompt": question, "text": text})
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.skewed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--rows", type=int, default=32)
    args = parser.parse_args()
    made = rows(args.photos, args.out, args.rows)
    counts = sorted(len(row["text"].split()) for row in made)
    print(f"{len(made)} rows; words of an answer: {counts[0]}, quarters {[counts[len(counts) * q // 4] for q in (1, 2, 3)]}, {counts[-1]};"
          f" rows by pictures: {[sum(len(row['image']) == k for row in made) for k in (0, 1, 2)]}")  # fmt: skip


if __name__ == "__main__":
    main()
