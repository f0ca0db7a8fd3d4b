"""easy-vqa's questions as one table that `data=table` reads: training questions, and one question for each held-out picture.

    python experiments/real_small/easy_vqa.py UNPACKED_WHEEL OUT.jsonl [--what] [--shuffled]

The split is the package's own: its training pictures train, its test pictures are held out (400 of them), each with one of its questions,
so that held-out rows are independent of each other. No picture is in both. `--what` leaves out the questions that yes or no answers.
`--shuffled` gives each held-out question the next row's picture: the control that says what the words alone are worth.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

HELD_OUT = 400


def main() -> None:
    data, out, flags = Path(sys.argv[1]) / "easy_vqa" / "data", Path(sys.argv[2]), sys.argv[3:]
    rng, rows = random.Random(0), []
    for split, name in (("train", "train"), ("validation", "test")):
        asked = json.loads((data / name / "questions.json").read_text(encoding="utf-8"))
        rng.shuffle(asked)
        if "--what" in flags:
            asked = [turn for turn in asked if turn[1] not in ("yes", "no")]
        if split == "validation":
            asked = list({number: (question, answer, number) for question, answer, number in asked}.values())[:HELD_OUT]
        shown = [number for _, _, number in asked]
        if split == "validation" and "--shuffled" in flags:
            shown = shown[1:] + shown[:1]
        for (question, answer, _), number in zip(asked, shown, strict=True):
            picture = os.path.relpath(data / name / "images" / f"{number}.png", out.parent)
            rows.append({"image": picture, "prompt": question, "text": answer, "split": split})
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8", newline="\n")
    print(f"{out}: {len(rows)} questions, {len({row['image'] for row in rows})} pictures")


if __name__ == "__main__":
    main()
