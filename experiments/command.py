"""Commands of mmft in this process, for studies with many short ones: starting Python takes longer than most of them."""

from __future__ import annotations

from mmft.cli.main import main as mmft


def run(words: list[str], out: str) -> None:
    """One command with the output directory `out`. Errors raised: SystemExit if it fails."""
    print("\nmmft", *words)
    if mmft([*words, f"output_dir={out}"]):
        raise SystemExit(f"failed: mmft {' '.join(words)}")
