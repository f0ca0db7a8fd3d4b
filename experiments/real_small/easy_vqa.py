"""easy-vqa's questions as one table that `data=table` reads: training questions, and one question for each held-out picture.

    python experiments/real_small/easy_vqa.py UNPACKED_WHEEL OUT.jsonl [HELD_OUT]

The split is the package's own: its training pictures train, its test pictures are held out (HELD_OUT of them, 400), each with one of its
questions, so that held-out rows are independent of each other. No picture is in both.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path


def main() -> None:
    data, out = Path(sys.argv[1]) / "easy_vqa" / "data", Path(sys.argv[2])
    held_out = int(sys.argv[3]) if len(sys.argv) > 3 else 400
    rng, rows = random.Random(0), []
    for split, name in (("train", "train"), ("validation", "test")):
        asked = json.loads((data / name / "questions.json").read_text(encoding="utf-8"))
        rng.shuffle(asked)
        if split == "validation":
            asked = list({number: (question, answer, number) for question, answer, number in asked}.values())[:held_out]
        for question, answer, number in asked:
            picture = os.path.relpath(data / name / "images" / f"{number}.png", out.parent)
            rows.append({"image": picture, "prompt": question, "text": answer, "split": split})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    print(f"{out}: {len(rows)} questions, {len({row['image'] for row in rows})} pictures")


if __name__ == "__main__":
    main()
