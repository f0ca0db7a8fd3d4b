"""Run against run, from the files of two run directories: environment, data, losses, adapter, metrics, and a verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.files import read_json, read_jsonl, read_yaml
from ..reports.files import is_number
from ..reports.page import flatten
from .weights import compare_weights

IDENTICAL, EQUAL, DIFFERENT = "identical to the bit", "equal within tolerance", "different"
# Relative. Another machine adds in another order: about one rounding of the dtype each step, which Adam's division by
# small second moments enlarges a thousandfold over a short training (fp32 rounds at 6e-8, fp16 at 5e-4, bf16 at 4e-3).
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
# How long something took, and sums that follow from it, differ between any two runs.
CLOCK = ("seconds", "epoch", "step", "total_flos")
CLOCK_ENDS = ("_runtime", "_per_second")
# Settings that say where a run writes and who watches it, not what it computes.
PLACES = ("output_dir", "run_dir", "name", "logger", "task")
# What env.json holds that is no cause of a difference.
NO_CAUSE = ("created", "data.path", "notes", "hardware.memory_mb")


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Everything that tells two runs apart, as plain values; "verdict" is one of IDENTICAL, EQUAL, DIFFERENT.

    `first` is the older run. A run without results (it failed) is different from every other.
    """
    envs = [read_json(run / "env.json") for run in (first, second)]
    tolerance = max(TOLERANCE.get(str(env.get("dtype")), TOLERANCE["float32"]) for env in envs)
    result: dict[str, Any] = {
        "runs": [first.name, second.name],
        "tolerance": tolerance,
        "settings": differences(read_yaml(first / "snapshot.yaml"), read_yaml(second / "snapshot.yaml"), PLACES),
        "environment": differences(envs[0], envs[1], NO_CAUSE),
        "inputs": _inputs(*envs),
        "losses": compare_losses(*(read_jsonl(run / "metrics.jsonl") for run in (first, second))),
        "weights": compare_weights(first, second),
        "metrics": compare_metrics(*(read_json(run / "summary.json") for run in (first, second))),
        "answers": compare_answers(*(read_jsonl(run / "eval" / "tuned.jsonl") for run in (first, second))),
        "status": [read_json(run / "summary.json").get("status") or "unfinished" for run in (first, second)],
    }
    if not any(what == "base model" for what, *_ in result["inputs"]):  # a branch's name against the commit it stood for
        result["settings"] = [s for s in result["settings"] if s[0] != "model.revision"]
    result["verdict"] = verdict(result)
    result["why"] = explanation(result)
    return result


def verdict(result: dict[str, Any]) -> str:
    """The verdict of a comparison: results decide; runs of other data or another base are never the same."""
    losses, weights, metrics = result["losses"], result["weights"], result["metrics"]
    if result["inputs"] or any(s != "finished" for s in result["status"]):
        return DIFFERENT
    parts = (losses, weights, metrics)
    if any(p["unmatched"] for p in parts):
        return DIFFERENT
    if all(p["largest"] == 0 for p in parts) and weights["hashes"][0] == weights["hashes"][1] and not result["answers"]["different"]:
        return IDENTICAL
    return EQUAL if all(p["largest"] <= result["tolerance"] for p in parts) else DIFFERENT


def explanation(result: dict[str, Any]) -> list[str]:
    """What differs first and what may be the cause, one line each, the strongest cause first."""
    lines = [f"run {name} is {status}" for name, status in zip(result["runs"], result["status"], strict=True) if status != "finished"]
    lines += [f"{what}: {a} -> {b}" for what, a, b in result["inputs"]]
    lines += [f"setting {what}: {a} -> {b}" for what, a, b in result["settings"]]
    losses, weights = result["losses"], result["weights"]
    if losses["first"]:
        lines.append("the first difference is in {key} at step {step}: {values[0]!r} -> {values[1]!r}".format(**losses["first"]))
    lines += [f"{what} is in one run only" for part in (losses, weights, result["metrics"]) for what in part["unmatched"][:3]]
    if not losses["first"] and losses["steps"] and weights["largest"]:
        lines.append(
            f"every logged loss is equal to the bit and the weights are not (most in {weights['where']}):"
            " one of the stored adapters was changed after its training"
        )
    if not result["inputs"]:
        lines += [f"environment {what}: {a} -> {b}" for what, a, b in result["environment"] if not what.startswith(("data.", "model."))]
    return lines


def table(result: dict[str, Any]) -> dict[str, str]:
    """What was compared and what came of it, for the terminal."""
    losses, weights, metrics, answers = (result[k] for k in ("losses", "weights", "metrics", "answers"))
    same = [f"{losses['steps']} logged losses equal to the bit" if losses["steps"] else "none logged"]
    if losses["first"]:
        same = [f"first difference at step {losses['first']['step']} ({losses['first']['key']}), largest {losses['largest']:.2g} of the value"]
    hashes = [h[:12] if h else "none" for h in weights["hashes"]]
    return {
        "runs": " -> ".join(result["runs"]),
        "losses": same[0],
        "weights": f"sha256 {hashes[0]}, both" if hashes[0] == hashes[1] else f"sha256 {hashes[0]} -> {hashes[1]}, apart by {weights['largest']:.2g} of their norm",
        "metrics": f"{len(metrics['rows'])} figures, largest difference {metrics['largest']:.2g}",
        "answers": f"{answers['different']} of {answers['rows']} differ",
        "tolerance": f"{result['tolerance']:g} (relative; fractions absolute)",
        "verdict": result["verdict"],
    }


# --- parts ---------------------------------------------------------------------------------------------------------


def differences(first: dict[str, Any], second: dict[str, Any], skip: tuple[str, ...] = ()) -> list[list[str]]:
    """[dotted key, value in first, value in second] of every value that differs; "-" where there is none."""
    rows = [dict(flatten(value)) for value in (first, second)]
    keys = [k for k in {**rows[0], **rows[1]} if not any(k == s or k.startswith(f"{s}.") for s in skip)]
    return [[k, rows[0].get(k) or "-", rows[1].get(k) or "-"] for k in keys if (rows[0].get(k) or "-") != (rows[1].get(k) or "-")]


def _inputs(first: dict[str, Any], second: dict[str, Any]) -> list[list[str]]:
    """What went in: data and base by their fingerprints, and the seed."""
    names = {"data.fingerprint": "data fingerprint", "model.revision": "base model", "seed": "seed"}
    found = {k: (a, b) for k, a, b in differences(first, second)}
    return [[label, *found[key]] for key, label in names.items() if key in found]


def relative(a: float, b: float) -> float:
    """|a - b| against the larger of both; 0 when they are the same number."""
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def compare_losses(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, Any]:
    """Every scalar of metrics.jsonl at every logged step; "first" is the earliest that differs in a bit.

    With logging_steps above 1 a logged loss is the mean since the step before; the difference began after that one.
    """
    rows = [_by_step(r) for r in (first, second)]
    shared = sorted(rows[0].keys() & rows[1].keys())
    found: dict[str, Any] = {"steps": len({s for s, k in shared if k == "loss"}), "different": 0, "largest": 0.0, "first": None}
    found["unmatched"] = [f"{key} at step {step}" for step, key in sorted(rows[0].keys() ^ rows[1].keys())]
    for step, key in shared:
        a, b = rows[0][step, key], rows[1][step, key]
        if a == b:
            continue
        found["different"] += 1
        found["first"] = found["first"] or {"step": step, "key": key, "values": [a, b]}
        if key != "grad_norm":  # clipped: it is shown, its size does not decide
            found["largest"] = max(found["largest"], relative(a, b))
    return found


def _by_step(rows: list[dict[str, Any]]) -> dict[tuple[int, str], float]:
    return {
        (row["step"], key): value
        for row in rows if is_number(row.get("step"))
        for key, value in row.items() if is_number(value) and key not in CLOCK and not key.endswith(CLOCK_ENDS)
    }  # fmt: skip


def compare_metrics(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """The figures of both summaries; a fraction's difference counts as it is, a loss's against its size."""
    rows: list[list[Any]] = []
    unmatched = []
    for prefix, metrics, loss in (("base ", "base_metrics", "base_eval_loss"), ("", "metrics", "eval_loss")):
        a, b = ({"loss": s.get(loss), **(s.get(metrics) or {})} for s in (first, second))
        for key in {**a, **b}:
            x, y = a.get(key), b.get(key)
            if is_number(x) and is_number(y):
                rows.append([prefix + key, x, y, relative(x, y) if key == "loss" else abs(x - y)])
            elif is_number(x) != is_number(y):
                unmatched.append(prefix + key)
    return {"rows": rows, "largest": max((r[3] for r in rows), default=0.0), "unmatched": unmatched}


def compare_answers(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> dict[str, int]:
    """How many held-out rows both answered, and how many of the answers differ."""
    texts = [{(r.get("index"), r.get("id")): r.get("prediction") for r in rows} for rows in (first, second)]
    shared = texts[0].keys() & texts[1].keys()
    return {"rows": len(shared), "different": sum(texts[0][k] != texts[1][k] for k in shared)}
