"""Exact match of base and tuned model, of the tuned one shown other pictures, and of the best answer without any picture.

    python experiments/real_small/figures.py RUN QUESTIONS.jsonl README.md NAME

Reads what `mmft evaluate` wrote into the run (the evaluation on another data set than the run's own is the shuffled one) and the training
questions; writes the table between the README's markers NAME. Intervals: 95 %, bootstrap over held-out pictures, of which each question has its own.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from table import put

DRAWS = 2000


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def kind(answer: str) -> str:
    return "yes or no" if answer in ("yes", "no") else "shape" if answer in ("circle", "rectangle", "triangle") else "color"


def interval(values: list[float]) -> str:
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(DRAWS))
    return f"{means[DRAWS // 40]:.3f} to {means[-DRAWS // 40 - 1]:.3f}"


def main() -> None:
    run, questions, readme = map(Path, sys.argv[1:4])
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    measured = {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted((run / "eval").glob("*.json"), key=lambda p: p.stat().st_mtime)}
    own = [p for p, m in measured.items() if m["fingerprint"] == summary["data_fingerprint"] and m["base_metrics"]][-1]
    shuffled = [p for p, m in measured.items() if m["fingerprint"] != summary["data_fingerprint"]][-1]
    tuned, base, swapped = rows(own.with_suffix(".jsonl")), rows(own.with_name(f"{own.stem}_base.jsonl")), rows(shuffled.with_suffix(".jsonl"))
    answers = [row["references"][0] for row in tuned]
    for found in (base, swapped):
        if [(r["prompt"], r["references"]) for r in found] != [(r["prompt"], r["references"]) for r in tuned]:
            raise SystemExit("the evaluations asked different questions: measure all of them on the same rows")
    usual: dict[str, Counter] = defaultdict(Counter)
    for row in rows(questions):
        if row["split"] == "train":
            usual[row["prompt"]][row["text"]] += 1
    hits = {
        "base": [float(r["metrics"]["exact_match"]) for r in base],
        "tuned": [float(r["metrics"]["exact_match"]) for r in tuned],
        "tuned, another question's picture": [float(r["metrics"]["exact_match"]) for r in swapped],
        "no picture: each question's commonest answer": [
            float(usual[r["prompt"]].most_common(1)[0][0] == a if usual[r["prompt"]] else 0) for r, a in zip(tuned, answers, strict=True)
        ],
    }
    losses = {"base": measured[own]["base_eval_loss"], "tuned": measured[own]["eval_loss"], "tuned, another question's picture": measured[shuffled]["eval_loss"]}
    kinds = [kind(a) for a in answers]
    names = [n for n in ("yes or no", "shape", "color") if n in kinds]
    lines = ["| | held-out loss | exact match | 95 % interval | " + " | ".join(f"{n} ({kinds.count(n)})" for n in names) + " |", "|---" * (4 + len(names)) + "|"]
    for name, right in hits.items():
        each = [sum(h for h, k in zip(right, kinds, strict=True) if k == n) / kinds.count(n) for n in names]
        loss = f"{losses[name]:.3f}" if name in losses else "-"
        lines.append(f"| {name} | {loss} | {sum(right) / len(right):.3f} | {interval(right)} | " + " | ".join(f"{e:.3f}" for e in each) + " |")
    gain = [a - b for a, b in zip(hits["tuned"], hits["tuned, another question's picture"], strict=True)]
    rank = [a - b for a, b in zip(hits["tuned"], hits["no picture: each question's commonest answer"], strict=True)]
    lines += [
        "",
        f"{len(tuned)} held-out questions, one a picture; {summary['steps']} steps of {summary['effective_batch_size']}. "
        f"Own picture against another: {sum(gain) / len(gain):+.3f} ({interval(gain)}); against the commonest answer: {sum(rank) / len(rank):+.3f} "
        f"({interval(rank)}). {summary['seconds'] / 60:.0f} minutes in all, peak memory {summary['peak_memory_mb'] / 1000:.1f} GB.",
    ]
    put(readme, sys.argv[4], "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
