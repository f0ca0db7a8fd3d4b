"""Makes a run directory that no run made, for the report's tests and for looking at the page.

    python tests/report/fake_run.py DIR [COCO_FOLDER]     then open DIR/report.html
"""

import json
import math
import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw

from mmft.evaluation.metrics.defaults import compute, per_sample

COLOURS = {"red": "#d33", "green": "#2a5", "blue": "#36c", "yellow": "#ec3", "purple": "#93c", "white": "#eee"}
SHAPES = ("circle", "square", "triangle")


def make_run(run_dir: Path, samples: int = 30, seed: int = 0, coco: Path | None = None) -> Path:
    """Write every file of the contract but loss_curve.png and report.html; returns run_dir."""
    draw = random.Random(seed)
    run_dir = Path(run_dir)
    (run_dir / "eval").mkdir(parents=True)
    rows = _photos(coco, samples) if coco else _drawn(run_dir / "pictures", samples, draw)

    def predict(skill: float):
        words = sorted({w for r in rows for w in r["references"][0].split()})
        made = []
        for row in rows:
            said = [w if draw.random() < skill else draw.choice(words) for w in draw.choice(row["references"]).split() if draw.random() < 0.6 + skill / 2.4]
            made.append({**row, "prediction": " ".join(said), "metrics": per_sample(" ".join(said), row["references"])})
        return made

    base, tuned = predict(0.3), predict(0.96)
    tuned[0]["prediction"], tuned[0]["metrics"] = tuned[0]["references"][0], per_sample(tuned[0]["references"][0], tuned[0]["references"])
    for name, made in (("base", base), ("tuned", tuned)):
        _lines(run_dir / "eval" / f"{name}.jsonl", made)
    _lines(run_dir / "eval" / "samples.jsonl", [{"step": s, "samples": predict(0.2 + s / 250)[:4]} for s in (0, 50, 100, 150, 200)])

    log = []
    for step in range(1, 201):
        loss = 0.25 + 3.2 * math.exp(-step / 30) + draw.gauss(0, 0.06) * (0.3 + math.exp(-step / 30))
        log.append({"step": step, "epoch": step / 100, "seconds": step * 0.3, "loss": loss, "grad_norm": 1.0,
                    "learning_rate": 2e-4 * min(step / 10, 0.5 * (1 + math.cos(math.pi * step / 200)))})  # fmt: skip
        if step % 40 == 0:
            log.append({"step": step, "epoch": step / 100, "seconds": step * 0.3, "eval_loss": 0.35 + 3 * math.exp(-step / 32)})
    _lines(run_dir / "metrics.jsonl", log)

    def scores(made):
        return compute([r["prediction"] for r in made], [r["references"] for r in made])

    _json(run_dir / "summary.json", {
        "status": "done", "name": "tiny_shapes", "seconds": 84.3, "steps": 200, "samples_per_second": 41.7, "train_loss": {"first": 3.4, "last": 0.26},
        "eval_loss": 0.353, "base_eval_loss": 3.61, "metrics": scores(tuned), "base_metrics": scores(base), "trainable_parameters": 294912,
        "total_parameters": 3458304, "peak_memory_mb": 1312.5, "supervised_tokens": 51234, "effective_batch_size": 16, "seed": 42,
    })  # fmt: skip
    _json(run_dir / "lora_plan.json", {
        "method": "lora", "scope": "language", "trainable_parameters": 294912, "total_parameters": 3458304, "modules_to_save": [],
        "rows": [
            {"part": "vision", "modules": 0, "linear": 17, "r": "", "scale": None, "trainable": 0, "total": 918528},
            {"part": "connector", "modules": 0, "linear": 2, "r": "", "scale": None, "trainable": 0, "total": 148224},
            {"part": "language", "modules": 28, "linear": 29, "r": "16", "scale": 2.0, "trainable": 294912, "total": 2391552},
        ],
    })  # fmt: skip
    _json(run_dir / "env.json", {"created": "2026-01-31 12:34:56", "python": "3.11.7", "packages": {"torch": "2.14.1", "transformers": "5.23.0"},
                                 "hardware": {"cpu": "2 cores", "gpu": None}, "git": {"commit": "0a1b2c3", "dirty": False}})  # fmt: skip
    (run_dir / "snapshot.yaml").write_text("seed: 42\nlora:\n  r: 16\n  lora_alpha: 32\nmodel:\n  path: tiny\n", encoding="utf-8")
    (run_dir / "overrides.txt").write_text("model=tiny\ndata=shapes\nlora.r=16\n", encoding="utf-8")
    (run_dir / "DONE").touch()
    return run_dir


def _drawn(folder: Path, samples: int, draw: random.Random) -> list[dict]:
    folder.mkdir()
    rows = []
    for i in range(samples):
        colour, shape, ground = draw.choice(list(COLOURS)), draw.choice(SHAPES), draw.choice(list(COLOURS))
        picture = Image.new("RGB", (56, 56), COLOURS[ground])
        pen = ImageDraw.Draw(picture)
        if shape == "circle":
            pen.ellipse((14, 14, 42, 42), fill=COLOURS[colour], outline="black")
        else:
            pen.polygon([(14, 42), (42, 42), (42, 14), (14, 14)] if shape == "square" else [(14, 42), (42, 42), (28, 14)], fill=COLOURS[colour], outline="black")
        picture.save(folder / f"{i}.png")
        rows.append({"index": i, "id": f"shape-{i:04d}", "root": folder.as_posix(), "images": [f"{i}.png"], "prompt": "What is in the picture?",
                     "references": [f"a {colour} {shape} on {ground}"]})  # fmt: skip
    return rows


def _photos(coco: Path, samples: int) -> list[dict]:
    table = json.loads(next(coco.glob("captions_*.json")).read_text(encoding="utf-8"))
    captions: dict = {}
    for one in table["annotations"]:
        captions.setdefault(one["image_id"], []).append(one["caption"].strip())
    return [
        {"index": i, "id": one["file_name"], "root": (coco / "images").as_posix(), "images": [one["file_name"]], "prompt": "Describe the picture in one sentence.",
         "references": captions[one["id"]]}
        for i, one in enumerate(table["images"][:samples])
    ]  # fmt: skip


def _json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


if __name__ == "__main__":
    from mmft.reports.loss_curve import write_curve
    from mmft.reports.run_page import write_report

    made = make_run(Path(sys.argv[1]), samples=60, coco=Path(sys.argv[2]) if len(sys.argv) > 2 else None)
    write_curve(made)
    print(write_report(made))
