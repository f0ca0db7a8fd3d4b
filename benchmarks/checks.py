"""Whether two contenders did the same work: what watch.py saw of each, and the losses of every timed run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

FIRST, LATER = 1e-5, 1e-4  # how far a loss may lie from the plain loop's, at the first step and after it


def differences(plain: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What watch.py saw differ, in words; empty when both saw the same rows in the same order, start and losses alike.

    A step is compared as a whole: a contender may put the micro-batches of one step into one batch.
    """
    found = []
    if plain["adapter"] != other["adapter"]:
        found.append(f"the adapters start apart: {plain['adapter']} and {other['adapter']}")
    if len(plain["steps"]) != len(other["steps"]):
        found.append(f"{len(other['steps'])} steps, and {len(plain['steps'])} of the plain loop")
    for number, (a, b) in enumerate(zip(plain["steps"], other["steps"]), start=1):
        for key, what in (("ids", "token ids"), ("labels", "labels"), ("grid", "image grids")):
            if [row[key] for row in a["rows"]] != [row[key] for row in b["rows"]]:
                same = sorted(map(str, (row[key] for row in a["rows"]))) == sorted(map(str, (row[key] for row in b["rows"])))
                found.append(f"step {number}: other {what}{', in another order' if same else ''}")
                break
        counts = [sum(row["supervised"] for row in step["rows"]) for step in (a, b)]
        if counts[0] != counts[1]:
            found.append(f"step {number}: {counts[1]} supervised tokens, and {counts[0]} of the plain loop")
        if found:
            return found  # what follows from it is no news
    return found + apart([s["loss"] for s in plain["steps"]], [s["loss"] for s in other["steps"]])


def other_rows(plain: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """As `differences`, of a contender with an order of its own: the same start, and the same rows in all steps together."""
    if plain["adapter"] != other["adapter"]:
        return [f"the adapters start apart: {plain['adapter']} and {other['adapter']}"]
    rows = [sorted(str((row["ids"], row["labels"], row["grid"])) for step in seen["steps"] for row in step["rows"]) for seen in (plain, other)]
    return [] if rows[0] == rows[1] else ["other rows than the plain loop's"]


def apart(plain: Sequence[float], other: Sequence[float]) -> list[str]:
    """The first step at which the losses differ by more than rounding, in words; empty when none does."""
    if len(plain) != len(other):
        return [f"{len(other)} losses, and {len(plain)} of the plain loop"]
    for number, (a, b) in enumerate(zip(plain, other), start=1):
        if not abs(a - b) <= (FIRST if number == 1 else LATER):
            return [f"step {number}: loss {b:.6f}, and {a:.6f} of the plain loop"]
    return []
