"""Recall of the exchanged answers in a README: python measure.py README.md swapped.txt RUN..."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # table.py

from table import put

SCORES = {
    "tuned, mean per token": lambda row: row["loss"],
    "tuned, sum of the row": lambda row: row["loss"] * row["tokens"],
    "base, mean per token": lambda row: row["base_loss"],
    "tuned minus base": lambda row: row["loss"] - row["base_loss"],
}


def recall(rows: list[dict], swapped: set[str], score: str, share: float) -> float:
    """The share of `swapped` among the first `share` of the rows."""
    first = sorted(rows, key=lambda row: -SCORES[score](row))[: round(share * len(rows))]
    return len({row["id"] for row in first} & swapped) / len(swapped)


def main() -> None:
    swapped = set(Path(sys.argv[2]).read_text(encoding="utf-8").split())
    lines = ["| run | exact match | ranked by | top 5 % | top 10 % |", "|---|---|---|---|---|"]
    for run in map(Path, sys.argv[3:]):
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        (file,) = (run / "audit").glob("rank_*.jsonl")
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        for score in SCORES:
            shown = " | ".join(f"{recall(rows, swapped, score, share):.3f}" for share in (0.05, 0.10))
            lines.append(f"| {run.name} | {summary['metrics']['exact_match']:.3f} | {score} | {shown} |")
    put(Path(sys.argv[1]), "table", "\n".join(lines))


if __name__ == "__main__":
    main()
