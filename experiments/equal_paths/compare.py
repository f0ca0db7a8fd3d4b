"""How far runs along other paths are from the plain one: python compare.py README.md OUT.png PLAIN_SWEEP SWEEP...

For each point: the largest difference of a step's loss, of a weight of the final adapter (and that weight's share of the largest), of
the held-out loss, and how many held-out answers differ. Writes the table into the README and the differences of the losses, step by step, as a picture.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from table import put


def losses(run: Path) -> np.ndarray:
    """(steps,) the loss of each step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return np.array([row["loss"] for row in rows if "loss" in row])


def answers(run: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in (run / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]


def held_out(run: Path) -> float:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))["eval_loss"]


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    readme, picture, plain, others = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), [Path(word) for word in sys.argv[4:]]
    points = sorted(p.parent.name for p in plain.glob("*/DONE"))
    lines = ["| path | point | steps | largest difference of a loss | of a weight | largest weight | of the held-out loss | answers that differ |", "|---|---|---|---|---|---|---|---|"]
    figure, axis = plt.subplots(figsize=(8, 4))
    for sweep in others:
        for point in points:
            a, b = plain / point, sweep / point
            difference = np.abs(losses(a) - losses(b))
            first, second = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (a, b))
            assert first.keys() == second.keys() and first
            weight = max(float(np.abs(first[k].astype(np.float64) - second[k]).max()) for k in first)
            largest = max(float(np.abs(w).max()) for w in first.values())
            said, said_there = answers(a), answers(b)
            assert len(said) == len(said_there) and said
            differ = sum(x != y for x, y in zip(said, said_there, strict=True))
            lines.append(
                f"| {sweep.name} | {point} | {len(difference)} | {difference.max():.1e} | {weight:.1e} | {largest:.2f} | {abs(held_out(a) - held_out(b)):.1e} | {differ} of {len(said)} |"
            )
            axis.semilogy(np.arange(1, len(difference) + 1), np.maximum(difference, 1e-9), label=f"{sweep.name}, {point}")
    axis.set(xlabel="step", ylabel="difference of the loss (1e-9: none)")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(picture, dpi=110)
    put(readme, "table", "\n".join(lines))


if __name__ == "__main__":
    main()
