"""Writes a table made of run directories into a README, between `<!-- NAME -->` and `<!-- /NAME -->`.

    python experiments/table.py README.md RUN... --columns 'lora.r' 'loss=eval_loss' 's/step=times.train/steps' [--name table]

A column is a dotted key of the run's summary.json, else of its snapshot.yaml; `size:adapter` is the MB of a file or folder in the run,
`a/b` a quotient, `heading=column` gives it a name. A key that a run lacks is an error unless `--gaps` makes it a dash.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml


def value(run: Path, column: str) -> Any:
    """What `column` is in `run`. Errors raised: KeyError."""
    if "/" in column and not column.startswith("size:"):
        above, below = (value(run, part) for part in column.split("/"))
        return above / below
    if column.startswith("size:"):
        path = run / column.removeprefix("size:")
        files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
        if not files:
            raise KeyError(f"{path}: nothing there")
        return sum(p.stat().st_size for p in files) / 1e6
    for found in (json.loads((run / "summary.json").read_text(encoding="utf-8")), yaml.safe_load((run / "snapshot.yaml").read_text(encoding="utf-8"))):
        for key in column.split("."):
            found = found.get(key) if isinstance(found, dict) else None
        if found is not None:
            return found
    raise KeyError(f"{run}: no {column} in summary.json or snapshot.yaml")


def shown(cell: Any) -> str:
    if isinstance(cell, list):
        return ", ".join(shown(c) for c in cell)
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 100 else f"{cell:.3g}" if abs(cell) >= 10 else f"{cell:.3f}"
    return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)


def table(runs: list[Path], columns: list[str], gaps: bool) -> str:
    named = [(c.split("=", 1) if "=" in c else (c, c)) for c in columns]
    lines = ["| run | " + " | ".join(h for h, _ in named) + " |", "|---" * (len(named) + 1) + "|"]
    for run in runs:
        cells = []
        for _, column in named:
            try:
                cells.append(shown(value(run, column)))
            except KeyError:
                if not gaps:
                    raise
                cells.append("-")
        lines.append(f"| {run.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def put(readme: Path, name: str, text: str) -> None:
    """`text` between the markers of `name`. Errors raised: SystemExit where there are none."""
    old = readme.read_text(encoding="utf-8")
    new, found = re.subn(rf"(<!-- {re.escape(name)} -->\n).*?(<!-- /{re.escape(name)} -->)", lambda m: f"{m[1]}\n{text}\n\n{m[2]}", old, flags=re.DOTALL)
    if found != 1:
        raise SystemExit(f"{readme}: needs one pair of lines <!-- {name} --> and <!-- /{name} -->")
    readme.write_text(new, encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readme", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--columns", nargs="+", required=True)
    parser.add_argument("--name", default="table")
    parser.add_argument("--gaps", action="store_true")
    args = parser.parse_args()
    put(args.readme, args.name, table(args.runs, args.columns, args.gaps))


if __name__ == "__main__":
    main()
