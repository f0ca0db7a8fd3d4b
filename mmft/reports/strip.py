"""The picture strip of a leaderboard: the same held-out pictures, what every run answered."""

from __future__ import annotations

from typing import Any

from . import comparison
from .files import read_rows
from .page import shown_pictures

PICTURES, RUNS = 8, 12


def build(board: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"id", "prompt", "reference", pictures, "answers": [{"run", "text", "verdict"}]}]: where the runs differ most first.

    Of runs that differ only in their seed the best one speaks.
    """
    shown = [g["rows"][0] for g in board["groups"]] if board["groups"] else board["rows"]
    answers = [(row, {a.get("id"): a for a in read_rows(row["path"] / "eval" / "tuned.jsonl", row["path"])}) for row in shown]
    answers = [(row, own) for row, own in answers if own][:RUNS]
    if not answers:
        return []
    common = [i for i in answers[0][1] if all(i in own for _, own in answers)]

    def disagreement(i: Any) -> tuple:
        f1 = [comparison.scores(own[i]).get("token_f1", 0.0) for _, own in answers]
        return -len({str(own[i].get("prediction")) for _, own in answers}), min(f1) - max(f1)

    made = []
    for i in sorted(common, key=disagreement)[:PICTURES]:
        row = answers[0][1][i]
        made.append({
            "id": str(i), "prompt": str(row.get("prompt") or ""), "reference": str((row.get("references") or [""])[0]),
            "answers": [{"run": r["run"], "text": str(own[i].get("prediction") or ""), "verdict": comparison.verdict(own[i])} for r, own in answers],
            **shown_pictures(row, 220, 2),
        })  # fmt: skip
    return made
