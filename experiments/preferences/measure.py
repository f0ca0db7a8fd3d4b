"""A table of the runs in a README, the one that they start from first: python measure.py README.md SFT_RUN RUN..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # table.py

from table import put


def main() -> None:
    lines = ["| objective | beta | right colour preferred | reward accuracy | reward margin | KL | held-out loss |", "|---" * 7 + "|"]
    [start] = Path(sys.argv[2], "eval").glob("table_*.json")
    before = json.loads(start.read_text(encoding="utf-8"))
    lines.append(f"| the start: sft on random answers | - | {before['metrics']['class_accuracy']:.3f} | - | - | - | {before['eval_loss']:.3f} |")
    for run in map(Path, sys.argv[3:]):
        summary, config = (json.loads((run / "summary.json").read_text(encoding="utf-8")), yaml.safe_load((run / "snapshot.yaml").read_text(encoding="utf-8")))
        objective, metrics = config["objective"], summary["metrics"]
        cells = [metrics["class_accuracy"], *(metrics.get(k) for k in ("reward_accuracy", "reward_margin", "kl"))]
        shown = ["-" if v is None else f"{v:.3f}" for v in cells]
        name = objective["_target_"].rpartition(".")[2].lower()
        lines.append(f"| {name} | {objective.get('beta', '-')} | {' | '.join(shown)} | {summary['eval_loss']:.3f} |")
    put(Path(sys.argv[1]), "table", "\n".join(lines))


if __name__ == "__main__":
    main()
