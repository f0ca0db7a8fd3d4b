"""Does each stage use the picture? Held-out loss with the right picture against others and against a grey one.

    python measure.py WORK data=coco data.path=... (the words that run.sh trains with)

WORK holds llava/, aligned/ and tuned/; the table and the answers are written to WORK/results.md.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

SHUFFLES, CAPTIONS, ANSWERS, BATCH = 2, 2, 8, 8  # of each held-out photo, two of its five captions: five take too long here


def others(photos: list[str], seed: int) -> dict[str, str]:
    """photo -> another photo, each used once, none at its own place."""
    rng, order = random.Random(seed), list(photos)
    while any(a == b for a, b in zip(photos, order, strict=True)):
        rng.shuffle(order)
    return dict(zip(photos, order, strict=True))


def row_losses(opened: Any, rows: list[Any]) -> list[float]:
    """The mean loss of a caption's tokens, one number a row."""
    import torch

    from mmft.losses.supervised import supervised_loss

    losses = []
    with torch.no_grad():
        for start in range(0, len(rows), BATCH):
            batch = opened.collator(rows[start : start + BATCH])
            for i in range(batch["input_ids"].shape[0]):
                one = {k: v[i : i + 1] for k, v in batch.items()}
                keep = one["attention_mask"][0].bool()
                one = {k: v[:, keep] if k in ("input_ids", "attention_mask", "labels") else v for k, v in one.items()}
                loss, count = supervised_loss(opened.model, one)
                losses.append(loss.item() / int(count))
    return losses


def interval(values: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean; a value is a photo, since captions of one photo are not independent."""
    rng = random.Random(seed)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(2000))
    return means[50], means[-51]


def main() -> None:
    from PIL import Image

    from mmft.audit.checks import SwappedImages
    from mmft.config.compose import compose
    from mmft.data.prepare import prepared_data
    from mmft.runs.open import open_any

    work, words = Path(sys.argv[1]), sys.argv[2:]
    cfg = compose([*words, "model=llava", f"model.path={work / 'llava'}", "generation.max_new_tokens=24"])
    rows = [r for r in prepared_data(cfg).split("validation")]
    photos = sorted({r.images[0] for r in rows})
    rows = [r for p in photos for r in [r for r in rows if r.images[0] == p][:CAPTIONS]]
    picture = {r.images[0]: r.load_images()[0] for r in rows}
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    lines = ["| model | right picture | another picture | grey | another - right (95 % interval) | photos where right is better |", "|---|---|---|---|---|---|"]
    answers: dict[str, list[str]] = {p: [] for p in photos[:ANSWERS]}
    stages = {"assembled, untrained": None, "projector aligned": work / "aligned", "LoRA tuned": work / "tuned"}
    for name, run in stages.items():
        opened = open_any(run, cfg, [])
        opened.model.eval()
        right = row_losses(opened, rows)
        wrong = [0.0] * len(rows)
        for seed in range(SHUFFLES):
            at = others(photos, seed)
            for i, loss in enumerate(row_losses(opened, [SwappedImages(r, [picture[at[r.images[0]]]]) for r in rows])):
                wrong[i] += loss / SHUFFLES
        blank = row_losses(opened, [SwappedImages(r, [grey]) for r in rows])
        gain = {p: [w - a for a, w, r in zip(right, wrong, rows, strict=True) if r.images[0] == p] for p in photos}
        each = [sum(v) / len(v) for v in gain.values()]
        low, high = interval(each)
        mean = [sum(v) / len(v) for v in (right, wrong, blank)]
        lines.append(f"| {name} | {mean[0]:.3f} | {mean[1]:.3f} | {mean[2]:.3f} | {mean[1] - mean[0]:+.3f} ({low:+.3f} to {high:+.3f}) | {sum(g > 0 for g in each)} of {len(each)} |")
        print(lines[-1], flush=True)
        first = [next(r for r in rows if r.images[0] == p) for p in answers]
        opened.settings["generation"]["max_new_tokens"] = 24
        for p, text in zip(answers, opened.evaluator(first).generate(opened.model), strict=True):
            answers[p].append(" ".join(text.split()))
    lines += ["", f"{len(rows)} captions of {len(photos)} photos held out, {SHUFFLES} shuffles.", "", "| photo | a person's caption | " + " | ".join(stages) + " |", "|---" * (2 + len(stages)) + "|"]
    for p, said in answers.items():
        caption = next(r.answer_text for r in rows if r.images[0] == p)
        lines.append(f"| {p} | {caption} | " + " | ".join(said) + " |")
    (work / "results.md").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print("\n".join(lines[4:]))


if __name__ == "__main__":
    main()
