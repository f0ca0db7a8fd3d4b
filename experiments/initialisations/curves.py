"""Training loss by step of each initialisation, the mean over seeds with its range: python experiments/initialisations/curves.py SWEEP OUT.png"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml


def curves(sweep: Path) -> dict[float, dict[str, dict[int, list[float]]]]:
    """learning rate -> initialisation -> step -> the losses of the seeds."""
    found: dict[float, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for file in sorted(sweep.glob("*/metrics.jsonl")):
        cfg = yaml.safe_load((file.parent / "snapshot.yaml").read_text(encoding="utf-8"))
        start = str(cfg["lora"]["init_lora_weights"]).lower()
        for row in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if "loss" in row:
                found[float(cfg["trainer"]["learning_rate"])][start][row["step"]].append(row["loss"])
    return found


def main() -> None:
    found = curves(Path(sys.argv[1]))
    figure, axes = plt.subplots(1, len(found), figsize=(5.5 * len(found), 4), sharey=True, squeeze=False)
    for axis, rate in zip(axes[0], sorted(found)):
        for start, steps in sorted(found[rate].items()):
            x = sorted(steps)
            axis.plot(x, [sum(steps[n]) / len(steps[n]) for n in x], label=start)
            axis.fill_between(x, [min(steps[n]) for n in x], [max(steps[n]) for n in x], alpha=0.15)
        axis.set(title=f"learning rate {rate:g}", xlabel="step", yscale="log")
    axes[0][0].set_ylabel("training loss")
    axes[0][-1].legend()
    figure.tight_layout()
    figure.savefig(sys.argv[2], dpi=90)


if __name__ == "__main__":
    main()
