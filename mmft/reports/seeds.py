"""Runs that differ only in their seed as one line: mean and spread; which is best, and which is the cheapest as good."""

from __future__ import annotations

import statistics
from typing import Any

from ..common.files import read_jsonl
from .files import is_number

BEST, CHEAPEST = "best", "cheapest within 1 s.e."


def groups(board: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry for each setting, best mean first; [] unless a setting was run with several seeds. sd is the sample's (n - 1)."""
    if "seed" not in board["keys"]:
        return []
    place = board["keys"].index("seed")
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in board["rows"]:
        found.setdefault(tuple(v for i, v in enumerate(row["values"]) if i != place), []).append(row)
    if max(map(len, found.values())) < 2:
        return []
    made = []
    for values, rows in found.items():
        scores = [r["score"] for r in rows if r["status"] == "finished" and is_number(r["score"])]
        mean, sd = _mean_sd(scores)
        made.append({
            "values": list(values), "n": len(scores), "mean": mean, "sd": sd, "scores": scores, "rows": rows, "marks": [],
            "error": None if sd is None else sd / len(scores) ** 0.5,
            "loss": _mean_sd([r["loss"] for r in rows])[0], "loss_sd": _mean_sd([r["loss"] for r in rows])[1],
            **{k: _mean_sd([r[k] for r in rows])[0] for k in ("trainable", "scale", "memory", "seconds", "speed", "base")},
        })  # fmt: skip
    return sorted(made, key=lambda g: (g["mean"] is None, board["sign"] * g["mean"] if g["mean"] is not None else 0, g["values"]))


def _mean_sd(values: list[Any]) -> tuple[float | None, float | None]:
    values = [v for v in values if is_number(v)]
    return (statistics.fmean(values) if values else None), (statistics.stdev(values) if len(values) > 1 else None)


def mark(board: dict[str, Any]) -> None:
    """Mark the best setting and the cheapest (fewest trained parameters, then least time) within one standard error of it.

    The standard error is that of the mean over seeds; without seeds that of the mean over the held-out rows, which only
    figures have that are means over rows (neither the loss nor CIDEr nor BLEU).
    """
    if board["groups"]:
        candidates = [g for g in board["groups"] if g["mean"] is not None]
        value = "mean"
    else:
        candidates = [r for r in board["rows"] if r["status"] == "finished" and is_number(r["score"])]
        value = "score"
    if len(candidates) < 2:
        return
    best = candidates[0]
    best["marks"].append(BEST)
    error = best["error"] if board["groups"] else _row_error(best, board["by"])
    if error is None:
        board["notes"].append("No standard error is known for the best, so no cheaper one is called as good: sweep seed=1,2,3 too.")
        return
    limit = board["sign"] * best[value] + error
    as_good = [c for c in candidates if board["sign"] * c[value] <= limit + 1e-12]
    cheapest = min(as_good, key=lambda c: (c["trainable"] if is_number(c["trainable"]) else 1e18, c["seconds"] if is_number(c["seconds"]) else 1e18))
    cheapest["marks"].append(CHEAPEST)
    over = f"{best['n']} seeds" if board["groups"] else "the held-out rows"
    board["notes"].append(f"One standard error of the best's {board['label']} over {over}: {error:.3g}.")


def _row_error(row: dict[str, Any], by: str) -> float | None:
    values = [r["metrics"][by] for r in read_jsonl(row["path"] / "eval" / "tuned.jsonl") if is_number((r.get("metrics") or {}).get(by))]
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
