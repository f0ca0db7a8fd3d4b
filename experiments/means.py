"""Means over seeds of finished points of a sweep's leaderboard.csv, as a table in a README between `<!-- NAME -->` and `<!-- /NAME -->`.

    python experiments/means.py README.md leaderboard.csv --by lora.r --columns eval_loss exact_match --name NAME
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

from table import put


def number(text: str) -> tuple[int, float, str]:
    """Sorts numbers as numbers, and words behind them."""
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def cell(values: list[float]) -> str:
    """Mean ± sample standard deviation; one number where all are the same."""
    if max(values) == min(values):
        return f"{values[0]:,.0f}" if values[0] == int(values[0]) and values[0] > 100 else f"{values[0]:.3g}" if values[0] == int(values[0]) else f"{values[0]:.3f}"
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def means(path: Path, by: list[str], columns: list[str]) -> str:
    """The table's text. Errors raised: KeyError for a column that the leaderboard lacks; SystemExit for an unfinished point."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    left = [row["run"] for row in rows if row["status"] != "finished"]
    if left:
        raise SystemExit(f"{path}: not finished: {', '.join(left)}")
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in by), []).append(row)
    lines = ["| " + " | ".join([*by, "runs", *columns]) + " |", "|---" * (len(by) + len(columns) + 1) + "|"]
    for key in sorted(groups, key=lambda k: [number(part) for part in k]):
        own = groups[key]
        lines.append("| " + " | ".join([*key, str(len(own)), *(cell([float(r[c]) for r in own]) for c in columns)]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path)
    parser.add_argument("leaderboard", type=Path)
    parser.add_argument("--by", nargs="+", required=True)
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--name", default="table")
    args = parser.parse_args()
    put(args.readme, args.name, means(args.leaderboard, args.by, args.columns))


if __name__ == "__main__":
    main()
