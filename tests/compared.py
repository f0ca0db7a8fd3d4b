"""A small set of drawn pairs, and of labelled answers, with the words that train the tiny model on them."""

from __future__ import annotations

import json
from pathlib import Path

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
FEW = ["data.splits.validation=4", "trainer.max_steps=6", "trainer.logging_steps=2", "trainer.per_device_train_batch_size=4", "trainer.learning_rate=0.003",
       "generation.max_new_tokens=2", "evaluation.samples=0", "logger=none", "metrics=[exact_match]"]  # fmt: skip


def draw(folder: Path) -> Path:
    """24 squares of one colour with a question, a right and a wrong colour; pairs.jsonl and labels.jsonl name them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    names, pairs, labels = list(COLOURS), [], []
    for n in range(24):
        right, wrong = names[n % 4], names[(n + 1 + n // 4 % 3) % 4]
        Image.new("RGB", (56, 56), tuple(min(255, v + n) for v in COLOURS[right])).save(folder / f"{n}.png")
        row = {"image": f"{n}.png", "question": "Which colour?"}
        pairs.append({**row, "chosen": right, "rejected": f"{wrong} square" if n % 3 == 0 else wrong})
        labels.append({**row, "answer": right if n % 2 else wrong, "good": bool(n % 2)})
    for name, rows in (("pairs", pairs), ("labels", labels)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def pairs(folder: Path, *more: str) -> list[str]:
    """The words for pairs.jsonl."""
    return ["data=table", f"data.path={(folder / 'pairs.jsonl').as_posix()}",
            "data.columns={image: image, prompt: question, text: chosen, rejected: rejected}", *FEW, *more]  # fmt: skip


def labels(folder: Path, *more: str) -> list[str]:
    """The words for labels.jsonl."""
    return ["data=table", f"data.path={(folder / 'labels.jsonl').as_posix()}",
            "data.columns={image: image, prompt: question, text: answer, label: good}", *FEW, *more]  # fmt: skip
