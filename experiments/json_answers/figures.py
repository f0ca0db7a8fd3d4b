"""Writes base, tuned, change, interval and p of a run, and how often each field is right, into a README, between `<!-- NAME -->` and `<!-- /NAME -->`.

    python figures.py RUN README.md NAME
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from table import put

FIELDS = ("kind", "color", "place")


def valid(run: Path) -> list[tuple[list[dict[str, str]], list[dict[str, str]]]]:
    """(shapes of the answer, shapes of the reference) of every answer that satisfies the schema."""
    rows = [json.loads(line) for line in (run / "eval" / "tuned.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(json.loads(r["prediction"])["shapes"], json.loads(r["references"][0])["shapes"]) for r in rows if r["metrics"]["json_schema"]]


def share(answers: list[tuple[list[dict[str, str]], list[dict[str, str]]]], key: str) -> str:
    given = sum(len(answer) for answer, _ in answers)
    right = sum((Counter(s[key] for s in answer) & Counter(s[key] for s in reference)).total() for answer, reference in answers)
    return f"{right} of {given}"


def main(run: Path, readme: Path, name: str) -> None:
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    lines = ["| score | base | tuned | change | 95 % interval | p |", "|---|---|---|---|---|---|"]
    for score, gain in summary["gains"].items():
        base, tuned = ((summary["base_metrics"] | {"eval_loss": summary["base_eval_loss"]})[score], (summary["metrics"] | {"eval_loss": summary["eval_loss"]})[score])
        lines.append(f"| {score} | {base:.3f} | {tuned:.3f} | {gain['value']:+.3f} | {gain['low']:+.3f} to {gain['high']:+.3f} | {gain['p']:.3f} |")
    cut, kept = summary["answer_counts"]["truncated"], summary["keep"]["scenes"]
    lines += ["", f"{summary['answer_counts']['rows']} held-out rows, {cut} answers cut off; {kept['rows']} kept rows, {kept['answer_counts']['truncated']} cut off; "
              f"{summary['steps']} steps of {summary['effective_batch_size']}, {summary['times']['train']:.0f} s of training."]  # fmt: skip
    lines += ["", f"Fields of the {len(answers := valid(run))} valid answers that the reference has too: " + ", ".join(f"{key} {share(answers, key)}" for key in FIELDS) + "."]
    put(readme, name, "\n".join(lines))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
