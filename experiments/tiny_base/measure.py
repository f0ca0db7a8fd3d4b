"""Exact match of a model on its own kinds of questions, asked one at a time about scenes nobody trained on.

    python experiments/tiny_base/measure.py MODEL [PICTURES]
"""

from __future__ import annotations

import sys
from collections import defaultdict
from random import Random

from mmft.data.sources.drawing import draw, random_scene
from mmft.data.sources.scenes import QUESTIONS

SIDE, BATCH = 168, 64


def asked(pictures: int) -> list[tuple[str, object, str, str]]:
    """(kind, picture, question, answer); `pictures` scenes, every kind each scene allows."""
    found = []
    for number in range(pictures):
        rng = Random(f"measure/{number}")
        scene = random_scene(rng, SIDE, 1, 4)
        picture = draw(scene)
        for ask in QUESTIONS:
            if (turn := ask(rng, scene)) is not None:
                found.append((ask.__name__.strip("_"), picture, *turn))
    return found


def main() -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path, pictures = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100
    processor = AutoProcessor.from_pretrained(path)
    processor.tokenizer.padding_side = "left"
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    right: dict[str, list[bool]] = defaultdict(list)
    rows = asked(pictures)
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        texts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                add_generation_prompt=True,
                tokenize=False,
            )
            for _, _, question, _ in part
        ]
        batch = processor(text=texts, images=[picture for _, picture, _, _ in part], padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**batch, max_new_tokens=64)
        said = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for (kind, _, _, answer), words in zip(part, said, strict=True):
            right[kind].append(words.strip() == answer)
    print("| question | asked | exact match |\n|---|---|---|")
    for kind, hits in right.items():
        print(f"| {kind} | {len(hits)} | {sum(hits) / len(hits):.3f} |")
    every = [hit for hits in right.values() for hit in hits]
    print(f"| all | {len(every)} | {sum(every) / len(every):.3f} |")


if __name__ == "__main__":
    main()
