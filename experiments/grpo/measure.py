"""A table of the runs in a README: python measure.py README.md OUTPUT_DIR"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # table.py

from table import put

NAMES = {
    "dapo-1": "`loss_type=dapo` (the default)", "dapo-2": "the same, seed 2", "grpo-1": "`loss_type=grpo`", "dr_grpo-1": "`loss_type=dr_grpo`, `scale_rewards=none`",
    "gspo-1": "GSPO, two updates of the same answers", "kl-1": "`beta=0.1`", "sft-1": "`objective=sft`: the right answers themselves",
}  # fmt: skip


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def main() -> None:
    readme, out = map(Path, sys.argv[1:])
    [start] = (out / "start" / "eval").glob("table_*.json")
    before = read(start)
    lines = ["| objective | reward, first to last | exact match after 10 steps | 20 | 30 | 40 | KL at the end | held-out loss |", "|---" * 8 + "|"]
    lines.append(f"| the start: sft on random answers | - | - | - | - | {before['metrics']['exact_match']:.3f} | - | {before['eval_loss']:.3f} |")
    for name, shown in NAMES.items():
        summary = read(out / name / "summary.json")
        rows = [json.loads(line) for line in (out / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        on_the_way = {row["step"]: row["eval_exact_match"] for row in rows if "eval_exact_match" in row}
        reward, kl = summary.get("reward"), [row["kl"] for row in rows if "kl" in row]
        cells = ["-" if reward is None else f"{reward['first']:.2f} to {reward['last']:.2f}", *(f"{on_the_way[step]:.3f}" for step in (10, 20, 30)),
                 f"{summary['metrics']['exact_match']:.3f}", f"{kl[-1]:.3f}" if kl else "-", f"{summary['eval_loss']:.3f}"]  # fmt: skip
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    put(readme, "table", "\n".join(lines))


if __name__ == "__main__":
    main()
