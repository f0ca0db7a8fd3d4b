"""Base and tuned model of a run on its held-out pictures, with their own picture, another held-out one, and a grey one.

    python experiments/real_folder/measure.py RUN README.md

Loss: the mean of a caption's tokens, then over captions. CIDEr and token F1: of generated answers, against the picture's own caption.
Writes the table and some answers between the README's markers. Intervals: 95 %, bootstrap over pictures.
"""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "llava_small")]

from measure import interval, others, row_losses  # noqa: E402 (llava_small's)
from table import put  # noqa: E402

ANSWERS = 12


def main() -> None:
    from PIL import Image

    from mmft.audit.checks import SwappedImages
    from mmft.config.compose import compose
    from mmft.data.prepare import prepared_data
    from mmft.runs.open import open_run

    run, readme = map(Path, sys.argv[1:3])
    opened = open_run(run, compose([]), [])
    rows = list(prepared_data(opened.cfg).split("validation"))
    at = others([r.id for r in rows], 0)
    picture = {r.id: r.load_images()[0] for r in rows}
    grey = Image.new("RGB", (224, 224), (128, 128, 128))
    shown = {
        "its own": rows,
        "another": [SwappedImages(r, [picture[at[r.id]]]) for r in rows],
        "grey": [SwappedImages(r, [grey]) for r in rows],
    }
    lines = ["| model | picture | held-out loss | own better by (95 % interval) | CIDEr | token F1 | exact match |", "|---|---|---|---|---|---|---|"]
    said: dict[str, list[dict]] = {}
    for name in ("base", "tuned"):
        own: list[float] = []
        for which, seen in shown.items():
            with opened.base() if name == "base" else contextlib.nullcontext():
                losses, (metrics, answers) = row_losses(opened, seen), opened.evaluator(seen).measure(opened.model)
            own = own or losses
            gain = [b - a for a, b in zip(own, losses, strict=True)]
            low, high = interval(gain)
            better = "-" if seen is rows else f"{sum(gain) / len(gain):+.3f} ({low:+.3f} to {high:+.3f})"
            values = " | ".join(f"{metrics[key]:.3f}" for key in ("cider", "token_f1", "exact_match"))
            lines.append(f"| {name} | {which} | {sum(losses) / len(losses):.3f} | {better} | {values} |")
            print(lines[-1], flush=True)
            said[f"{name}, {which}"] = answers
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines += [
        "",
        f"{len(rows)} pictures held out, {summary['steps']} steps of {summary['effective_batch_size']} on the others; "
        f"{summary['seconds'] / 60:.0f} minutes in all, peak memory {summary['peak_memory_mb'] / 1000:.1f} GB.",
    ]
    put(readme, "table", "\n".join(lines))
    kinds = ("base, its own", "tuned, its own", "tuned, another")
    told = ["| caption | " + " | ".join(kinds) + " |", "|---" * (1 + len(kinds)) + "|"]
    for n in range(0, len(rows), max(1, len(rows) // ANSWERS)):
        told.append(f"| {rows[n].answer_text} | " + " | ".join(" ".join(said[k][n]["prediction"].split()).replace("|", "/")[:80] for k in kinds) + " |")
    put(readme, "answers", "\n".join(told))


if __name__ == "__main__":
    main()
