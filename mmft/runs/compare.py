"""Compare two run directories: environment, data, losses, weights, metrics and answers, with a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, cast

from ..common.files import read_json, read_jsonl, read_yaml
from ..reports.numbers import is_number
from ..reports.run_files import flatten
from .weights import WeightsComparison, compare_weights

if TYPE_CHECKING:
    from ..common.records import AnswerRecord, Environment, MetricsRow, Summary

IDENTICAL, EQUAL, DIFFERENT = "identical to the bit", "equal within tolerance", "different"
# Relative. Another machine adds numbers in another order: about one rounding of the dtype per step, which Adam's division by small
# second moments enlarges a thousandfold over a short training (fp32 rounds at 6e-8, fp16 at 5e-4, bf16 at 4e-3).
TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 2e-2}
# Durations, and sums that follow from them, differ between any two runs.
CLOCK = ("seconds", "epoch", "step", "total_flos")
CLOCK_ENDS = ("_runtime", "_per_second")
# Settings that decide where a run writes and who is shown it, not what it computes.
PLACES = ("output_dir", "run_dir", "name", "logger", "task")
# Keys of env.json that cannot cause a difference.
NO_CAUSE = ("created", "data.path", "notes", "hardware.memory_mb")

Difference = list[str]  # [dotted key, value in the first run, value in the second]; "-" for a missing value


class FirstDifference(TypedDict):
    """The earliest logged value that differs: its step, its name, and both values."""

    step: int
    key: str
    values: list[float]


class LossComparison(TypedDict):
    """steps: number of logged losses in both runs. different: number of values that differ. largest: relative difference.

    unmatched: values that only one run logged.
    """

    steps: int
    different: int
    largest: float
    first: FirstDifference | None
    unmatched: list[str]


class MetricsComparison(TypedDict):
    """rows: [name, value in the first run, in the second, difference]. largest: of the differences."""

    rows: list[list[Any]]
    largest: float
    unmatched: list[str]


class AnswersComparison(TypedDict):
    """rows: held-out rows that both runs answered. different: how many of these answers differ."""

    rows: int
    different: int


class RunComparison(TypedDict, total=False):
    """reproduce.json. changes: the settings that `mmft reproduce` was told to change. verdict: IDENTICAL, EQUAL or DIFFERENT."""

    changes: list[str]
    runs: list[str]
    tolerance: float
    settings: list[Difference]
    environment: list[Difference]
    inputs: list[Difference]
    losses: LossComparison
    weights: WeightsComparison
    metrics: MetricsComparison
    answers: AnswersComparison
    status: list[str]
    verdict: str
    why: list[str]


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Compare two run directories; `first` is the older one. A run without results (it failed) differs from every other."""
    runs = (first, second)
    envs = [cast("Environment", read_json(run / "env.json")) for run in runs]
    summaries = [cast("Summary", read_json(run / "summary.json")) for run in runs]
    logged = [cast("list[MetricsRow]", read_jsonl(run / "metrics.jsonl")) for run in runs]
    answers = [cast("list[AnswerRecord]", read_jsonl(run / "eval" / "tuned.jsonl")) for run in runs]
    tolerance = max(TOLERANCE.get(str(env.get("dtype")), TOLERANCE["float32"]) for env in envs)
    result: RunComparison = {
        "runs": [first.name, second.name],
        "tolerance": tolerance,
        "settings": differences(read_yaml(first / "snapshot.yaml"), read_yaml(second / "snapshot.yaml"), PLACES),
        "environment": differences(envs[0], envs[1], NO_CAUSE),
        "inputs": _inputs(*envs),
        "losses": compare_losses(*logged),
        "weights": compare_weights(first, second),
        "metrics": compare_metrics(*summaries),
        "answers": compare_answers(*answers),
        "status": [summary.get("status") or "unfinished" for summary in summaries],
    }
    if not any(what == "base model" for what, *_ in result["inputs"]):  # the same files in another place, or a commit named by its branch
        result["settings"] = [s for s in result["settings"] if s[0] not in ("model.revision", "model.path", "model.hub")]
        result["environment"] = [s for s in result["environment"] if s[0] not in ("model.path", "model.hub")]
    result["verdict"] = verdict(result)
    result["why"] = explanation(result)
    return result


def verdict(result: RunComparison) -> str:
    """The verdict of a comparison. Results decide, but runs on other data or another base model are always different."""
    losses, weights, metrics = result["losses"], result["weights"], result["metrics"]
    if result["inputs"] or any(s != "finished" for s in result["status"]):
        return DIFFERENT
    if losses["unmatched"] or weights["unmatched"] or metrics["unmatched"]:
        return DIFFERENT
    largest = max(losses["largest"], weights["largest"], metrics["largest"])
    if largest == 0 and weights["hashes"][0] == weights["hashes"][1] and not result["answers"]["different"]:
        return IDENTICAL
    return EQUAL if largest <= result["tolerance"] else DIFFERENT


def explanation(result: RunComparison) -> list[str]:
    """What differs first and what may be the cause, one line each, the most likely cause first."""
    lines = [f"run {name} is {status}" for name, status in zip(result["runs"], result["status"], strict=True) if status != "finished"]
    lines += [f"{what}: {a} -> {b}" for what, a, b in result["inputs"]]
    lines += [f"setting {what}: {a} -> {b}" for what, a, b in result["settings"]]
    losses, weights = result["losses"], result["weights"]
    if losses["first"]:
        lines.append("the first difference is in {key} at step {step}: {values[0]!r} -> {values[1]!r}".format(**losses["first"]))
    unmatched = (losses["unmatched"], weights["unmatched"], result["metrics"]["unmatched"])
    lines += [f"{what} is in one run only" for names in unmatched for what in names[:3]]
    if not losses["first"] and losses["steps"] and weights["largest"]:
        lines.append(
            f"every logged loss is equal to the bit and the weights are not (most in {weights['where']}):"
            " one of the stored adapters was changed after its training"
        )
    if not result["inputs"]:
        lines += [f"environment {what}: {a} -> {b}" for what, a, b in result["environment"] if not what.startswith(("data.", "model."))]
    return lines


def comparison_table(result: RunComparison) -> dict[str, str]:
    """What was compared and the result, for the terminal."""
    losses, weights, metrics, answers = result["losses"], result["weights"], result["metrics"], result["answers"]
    loss = f"{losses['steps']} logged losses equal to the bit" if losses["steps"] else "none logged"
    if losses["first"]:
        loss = f"first difference at step {losses['first']['step']} ({losses['first']['key']}), largest {losses['largest']:.2g} of the value"
    hashes = [h[:12] if h else "none" for h in weights["hashes"]]
    return {
        "runs": " -> ".join(result["runs"]),
        "losses": loss,
        "weights": f"sha256 {hashes[0]}, both" if hashes[0] == hashes[1] else f"sha256 {hashes[0]} -> {hashes[1]}, apart by {weights['largest']:.2g} of their norm",
        "metrics": f"{len(metrics['rows'])} figures, largest difference {metrics['largest']:.2g}",
        "answers": f"{answers['different']} of {answers['rows']} differ",
        "tolerance": f"{result['tolerance']:g} (relative; fractions absolute)",
        "verdict": result["verdict"],
    }


# --- parts ---------------------------------------------------------------------------------------------------------


def differences(first: Mapping[str, Any], second: Mapping[str, Any], skip: tuple[str, ...] = ()) -> list[Difference]:
    """Every value that differs between two nested mappings, except below the keys in `skip`."""
    rows = [dict(flatten(value)) for value in (first, second)]
    keys = [k for k in {**rows[0], **rows[1]} if not any(k == s or k.startswith(f"{s}.") for s in skip)]
    return [[k, rows[0].get(k) or "-", rows[1].get(k) or "-"] for k in keys if (rows[0].get(k) or "-") != (rows[1].get(k) or "-")]


def _inputs(first: Environment, second: Environment) -> list[Difference]:
    """Differences of the inputs: data and base model by their fingerprints, and the seed."""
    names = {"data.fingerprint": "data fingerprint", "model.revision": "base model", "seed": "seed"}
    values = {k: (a, b) for k, a, b in differences(first, second)}
    return [[label, *values[key]] for key, label in names.items() if key in values]


def relative(a: float, b: float) -> float:
    """|a - b| as a share of the larger absolute value; 0 for equal numbers."""
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


def compare_losses(first: list[MetricsRow], second: list[MetricsRow]) -> LossComparison:
    """Compare every scalar of metrics.jsonl at every logged step, exactly.

    With logging_steps above 1 a logged loss is the mean since the previous logged step, so a difference began after that step.
    """
    values = [_by_step(rows) for rows in (first, second)]
    shared = sorted(values[0].keys() & values[1].keys())
    unmatched = [f"{key} at step {step}" for step, key in sorted(values[0].keys() ^ values[1].keys())]
    result: LossComparison = {"steps": len({s for s, k in shared if k == "loss"}), "different": 0, "largest": 0.0, "first": None, "unmatched": unmatched}
    for step, key in shared:
        a, b = values[0][step, key], values[1][step, key]
        if a == b:
            continue
        result["different"] += 1
        result["first"] = result["first"] or {"step": step, "key": key, "values": [a, b]}
        if key != "grad_norm":  # gradients are clipped, so its size does not decide
            result["largest"] = max(result["largest"], relative(a, b))
    return result


def _by_step(rows: list[MetricsRow]) -> dict[tuple[int, str], float]:
    """(step, name) -> logged value, without durations."""
    return {
        (row["step"], key): value
        for row in rows if is_number(row.get("step"))
        for key, value in row.items() if is_number(value) and key not in CLOCK and not key.endswith(CLOCK_ENDS)
    }  # fmt: skip


def compare_metrics(first: Summary, second: Summary) -> MetricsComparison:
    """Compare loss and metrics of both summaries. The difference of a loss is relative, that of a metric absolute."""
    rows: list[list[Any]] = []
    unmatched = []
    for prefix in ("base_", ""):
        a, b = _metrics(first, prefix), _metrics(second, prefix)
        for key in {**a, **b}:
            x, y = a.get(key), b.get(key)
            if is_number(x) and is_number(y):
                rows.append([prefix.replace("_", " ") + key, x, y, relative(x, y) if key == "loss" else abs(x - y)])
            elif is_number(x) != is_number(y):
                unmatched.append(prefix.replace("_", " ") + key)
    return {"rows": rows, "largest": max((r[3] for r in rows), default=0.0), "unmatched": unmatched}


def _metrics(summary: Mapping[str, Any], prefix: str) -> dict[str, float | None]:
    return {"loss": summary.get(f"{prefix}eval_loss"), **(summary.get(f"{prefix}metrics") or {})}


def compare_answers(first: list[AnswerRecord], second: list[AnswerRecord]) -> AnswersComparison:
    """Compare the answers to the held-out rows that both runs answered."""
    texts = [{(r.get("index"), r.get("id")): r.get("prediction") for r in rows} for rows in (first, second)]
    shared = texts[0].keys() & texts[1].keys()
    return {"rows": len(shared), "different": sum(texts[0][k] != texts[1][k] for k in shared)}
