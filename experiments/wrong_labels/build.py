"""Drawn shapes with some answers exchanged: python build.py FOLDER [pictures] [share]; writes rows.jsonl, the pictures and swapped.txt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

from mmft.data.sample import message_text
from mmft.data.sources.shapes import Shapes


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1728
    share = float(sys.argv[3]) if len(sys.argv) > 3 else 0.05
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    rows = []
    for row in Shapes(pictures=count).read():
        (folder / "pictures" / f"{row.id}.png").write_bytes(row.images[0])
        question, answer = (message_text(message) for message in row.messages)
        rows.append({"id": row.id, "image": f"pictures/{row.id}.png", "question": question, "text": answer})
    training = rows[:-128]  # the held-out rows keep their answers
    swapped = swap(training, round(share * len(training)), Random(7))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "swapped.txt").write_text("".join(f"{name}\n" for name in swapped), encoding="utf-8")


def swap(rows: list[dict[str, str]], count: int, rng: Random) -> list[str]:
    """Give `count` rows the answer of another one of them with the same question. Returns their ids."""
    chosen = rng.sample(range(len(rows)), count)
    swapped: list[str] = []
    for question in sorted({rows[i]["question"] for i in chosen}):
        same = [i for i in chosen if rows[i]["question"] == question]
        answers = [rows[i]["text"] for i in same]
        for i, answer in zip(same, answers[1:] + answers[:1], strict=True):
            if rows[i]["text"] != answer:
                rows[i]["text"] = answer
                swapped.append(rows[i]["id"])
    return swapped


if __name__ == "__main__":
    main()
