"""Writes base, tuned, change, interval and p of a run into a README, and what the tuned answers are: python figures.py RUN README.md

The scenes are drawn again from their numbers, so that an answer can be compared with the box of the shape that was not asked for.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from table import put

from mmft.data.sources.drawing import random_scene

KINDS = ("IoU of at least 0.75", "IoU of 0.5 to 0.75", "IoU below 0.5, near the shape", "the other shape", "no shape", "no box")


def iou(a: list[float], b: list[float]) -> float:
    width, height = (max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1))
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def kind(row: dict[str, Any], data: dict[str, Any]) -> tuple[int, str]:
    """(shapes in the image, what the answer is: one of KINDS)."""
    scene = random_scene(Random(f"boxes/{data['seed']}/{int(row['id'].split('-')[1])}"), data["side"], data["fewest"], data["most"])
    wanted = row["reference_boxes"][0]["box"]
    others = [list(map(float, item.box)) for item in scene.items if list(map(float, item.box)) != wanted]
    assert len(others) == len(scene.items) - 1, f"{row['id']}: the scene that is drawn again has no {wanted}"
    if not row["boxes"]:
        return len(scene.items), KINDS[5]
    box = row["boxes"][0]["box"]
    found = iou(box, wanted)
    if found < 0.5 and any(iou(box, other) > max(found, 0.1) for other in others):
        return len(scene.items), KINDS[3]
    return len(scene.items), KINDS[0 if found >= 0.75 else 1 if found >= 0.5 else 2 if found > 0.1 else 4]


def main(run: Path, readme: Path) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = ["| score | base | tuned | change | 95 % interval | p |", "|---|---|---|---|---|---|"]
    for score, gain in summary["gains"].items():
        base, tuned = ((summary["base_metrics"] | {"eval_loss": summary["base_eval_loss"]})[score], (summary["metrics"] | {"eval_loss": summary["eval_loss"]})[score])
        lines.append(f"| {score} | {base:.3f} | {tuned:.3f} | {gain['value']:+.3f} | {gain['low']:+.3f} to {gain['high']:+.3f} | {gain['p']:.3f} |")
    rows = [json.loads(line) for line in (run / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    data = yaml.safe_load((run / "snapshot.yaml").read_text(encoding="utf-8"))["data"]
    counts = Counter(kind(row, data) for row in rows)
    sizes = sorted({size for size, _ in counts})
    lines += ["", f"{len(rows)} held-out rows, {summary['steps']} steps of {summary['effective_batch_size']}.", ""]
    lines += ["| the tuned answer is | " + " | ".join(f"{size} shape{'s' * (size > 1)} in the image" for size in sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(str(counts[size, name]) for size in sizes) + " |" for name in KINDS]
    put(readme, "table", "\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
