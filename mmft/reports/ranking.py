"""A ranked set of runs: group them by seed, mark the best and the cheapest, flag runs that are not comparable."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..common.files import read_jsonl
from ..common.records import AnswerCounts, Difference, MetricValues, Summary
from ..evaluation.resampling import is_noise
from . import numbers
from .numbers import is_number

BEST, CHEAPEST, NOISE = "best", "cheapest within 1 s.e.", "within noise of the best"

# Settings whose difference makes runs not comparable, and why.
ORDER = (
    "seed", "trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps", "trainer.train_sampling_strategy", "trainer.tokens_per_batch",
)  # fmt: skip
AMOUNT = ("trainer.max_steps", "trainer.num_train_epochs", "data.draws")
HELD_OUT = ("evaluation.split", "evaluation.max_samples")


@dataclass
class RankedRun:
    """One run. run: its path below the folder. values: of the board's keys. score, base: the ranking value, tuned and base model.

    scale: largest effective scale of the adapter. memory: peak in MiB. speed: samples per second. report: whether report.html
    exists. settings: all of snapshot.yaml, flattened. flags: what makes it not comparable. to_best: the difference of its score from the
    best run's, on the rows that both measured.
    """

    run: str
    path: Path
    status: str
    values: list[str]
    score: float | None
    base: float | None
    loss: float | None
    trainable: float | None
    scale: float | None
    memory: float | None
    seconds: float | None
    speed: float | None
    metrics: MetricValues
    reason: str
    report: bool
    settings: dict[str, str]
    summary: Summary
    marks: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    to_best: Difference | None = None

    @property
    def counts(self) -> AnswerCounts | None:
        """Rows measured, answers cut off, rows left out."""
        return self.summary.get("answer_counts")

    @property
    def answered(self) -> str:
        """The counts as a table cell: `128`, `128, 5 cut off`, `120, 8 left out`."""
        if self.counts is None:
            return numbers.MISSING
        named = [f"{self.counts['truncated']} cut off" if self.counts["truncated"] else "", f"{self.counts['left_out']} left out" if self.counts["left_out"] else ""]
        return ", ".join([str(self.counts["rows"]), *filter(None, named)])


@dataclass
class SeedGroup:
    """Runs that differ only in their seed. Numbers are means over the finished ones of `rows`; sd: sample standard deviation (n - 1) of the score.

    n: number of finished runs with a score. error: standard error of the mean.
    """

    values: list[str]
    rows: list[RankedRun]
    scores: list[float]
    marks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.n = len(self.scores)
        self.mean, self.sd = mean_sd(self.scores)
        self.error = None if self.sd is None else self.sd / self.n**0.5
        done = [r for r in self.rows if r.status == "finished"] or self.rows  # a run that failed soon would lower the time
        self.loss = mean_sd(r.loss for r in done)[0]
        self.base = mean_sd(r.base for r in done)[0]
        self.trainable = mean_sd(r.trainable for r in done)[0]
        self.scale = mean_sd(r.scale for r in done)[0]
        self.memory = mean_sd(r.memory for r in done)[0]
        self.seconds = mean_sd(r.seconds for r in done)[0]
        self.speed = mean_sd(r.speed for r in done)[0]
        self.metrics = {name: mean for name in {n: 0 for r in done for n in r.metrics} if (mean := mean_sd(r.metrics.get(name) for r in done)[0]) is not None}


@dataclass
class Leaderboard:
    """Runs of a folder, the best first. by: the ranking value; sign: 1 if lower is better, else -1. keys: columns of settings.
    labels: of all metrics that were measured, by name. kept: those of the sets of evaluation.keep; main_kept: the main one of each set.

    sweep: whether the folder is a sweep's. differing: all settings that differ. groups: by setting, if it was run with several seeds.
    """

    name: str
    by: str
    label: str
    higher_is_better: bool
    labels: dict[str, str]
    sweep: bool
    keys: list[str]
    rows: list[RankedRun]
    differing: list[str]
    notes: list[str] = field(default_factory=list)
    groups: list[SeedGroup] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    main_kept: list[str] = field(default_factory=list)

    @property
    def sign(self) -> int:
        return -1 if self.higher_is_better else 1

    @property
    def heading(self) -> str:
        return f"{self.name}: {len(self.rows)} run{'s' * (len(self.rows) != 1)}, ranked by {self.label}"

    @property
    def counted(self) -> bool:
        """Whether any run recorded the numbers of its answers (older runs did not)."""
        return any(r.counts for r in self.rows)

    @property
    def setting_keys(self) -> list[str]:
        """The keys without the seed."""
        return [k for k in self.keys if k != "seed"]

    @property
    def finished(self) -> list[RankedRun]:
        return [r for r in self.rows if r.status == "finished"]


def mean_sd(values: Iterable[object]) -> tuple[float | None, float | None]:
    finite = [v for v in values if is_number(v)]
    return (statistics.fmean(finite) if finite else None), (statistics.stdev(finite) if len(finite) > 1 else None)


def seed_groups(board: Leaderboard) -> list[SeedGroup]:
    """One group for each setting, best mean first; [] unless a setting was run with several seeds."""
    if "seed" not in board.keys:
        return []
    place = board.keys.index("seed")
    by_setting: dict[tuple[str, ...], list[RankedRun]] = {}
    for row in board.rows:
        by_setting.setdefault(tuple(v for i, v in enumerate(row.values) if i != place), []).append(row)
    if max(map(len, by_setting.values())) < 2:
        return []
    groups = [SeedGroup(list(values), rows, [r.score for r in rows if r.status == "finished" and is_number(r.score)]) for values, rows in by_setting.items()]
    return sorted(groups, key=lambda g: (g.mean is None, board.sign * g.mean if g.mean is not None else 0, g.values))


def mark(board: Leaderboard) -> None:
    """Mark the best and the cheapest (fewest trained parameters, then least time) within one standard error of it.

    The standard error is that of the mean over seeds; without seeds that of the mean over the held-out rows, which exists
    only for metrics that are means over rows (neither the loss nor CIDEr nor BLEU).
    """
    candidates: list[tuple[float, SeedGroup | RankedRun]]
    if board.groups:
        candidates = [(g.mean, g) for g in board.groups if g.mean is not None]
    else:
        candidates = [(r.score, r) for r in board.finished if is_number(r.score)]
    if len(candidates) < 2:
        return
    value, best = candidates[0]
    best.marks.append(BEST)
    error = best.error if isinstance(best, SeedGroup) else _row_error(best, board.by)
    if error is None:
        board.notes.append("No standard error is known for the best, so no cheaper one is called as good: sweep seed=1,2,3 too.")
        return
    limit = board.sign * value + error
    as_good = [c for v, c in candidates if board.sign * v <= limit + 1e-12]
    cheapest = min(as_good, key=lambda c: (c.trainable if is_number(c.trainable) else 1e18, c.seconds if is_number(c.seconds) else 1e18))
    cheapest.marks.append(CHEAPEST)
    over = f"{best.n} seeds" if isinstance(best, SeedGroup) else "the held-out rows"
    board.notes.append(f"One standard error of the best's {board.label} over {over}: {error:.3g}.")


def mark_noise(board: Leaderboard, gaps: Mapping[str, Difference]) -> None:
    """Mark the runs whose difference from the best is within noise. gaps: that difference by the run's name."""
    for row in board.finished:
        row.to_best = gaps.get(row.run)
        if is_noise(row.to_best):
            row.marks.append(NOISE)
    if gaps:
        most = max(gap["resamples"] for gap in gaps.values())
        board.notes.append(f"Within noise of the best: the 95 % interval of the difference, by a paired bootstrap over the rows of both ({most:,} resamples), holds 0.")


def _row_error(row: RankedRun, by: str) -> float | None:
    values = [r["metrics"][by] for r in read_jsonl(row.path / "eval" / "tuned.jsonl") if is_number((r.get("metrics") or {}).get(by))]
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


# --- comparable conditions -----------------------------------------------------------------------------------------


def flag_conditions(board: Leaderboard) -> None:
    """Add to each run's flags what differs from most runs, and to the board's notes. Seeds repeated for each setting are no flag."""
    rows = board.finished
    usual_data, usual_count = _usual(r.summary.get("data_fingerprint") for r in rows), _usual(r.summary.get("held_out_samples") for r in rows)
    for row in rows:
        if row.summary.get("data_fingerprint") != usual_data:
            row.flags.append("other data")
        if row.summary.get("held_out_samples") != usual_count:
            row.flags.append(f"measured on {row.summary.get('held_out_samples')} rows, most on {usual_count}")
    _flag_draws(rows)
    for key in board.differing:
        reason = _reason(key)
        if reason is None or key == "seed" and board.groups:
            continue
        usual = _usual(r.settings.get(key, "") for r in rows)
        for row in rows:
            if row.settings.get(key, "") != usual:
                row.flags.append(f"{reason}: {key}={row.settings.get(key) or 'null'}")
    flagged = sum(bool(r.flags) for r in rows)
    if flagged:
        board.notes.append(f"{flagged} of {len(rows)} runs are not on equal terms with the others; what sets them apart is written beside them.")
    if board.groups:
        if missing := [r for r in board.rows if r.status != "finished"]:
            named = ", ".join(f"{r.run} {r.status}" for r in missing[:3]) + (", ..." if len(missing) > 3 else "")
            board.notes.append(f"{len(missing)} of {len(board.rows)} runs did not finish and are in no mean: {named}.")
        board.notes.append("The seed also decides the order of the data; every other condition is the same unless a run is flagged.")
    together = sum((r.summary.get("trained_together") or 1) > 1 for r in rows)
    if together:
        board.notes.append(
            f"{together} of {len(rows)} runs were trained in step with others: their time, speed and memory are those of the group, and say"
            " nothing about one setting against another (`hydra/launcher=basic` trains one after the other)."
        )
    _note_scale(board, rows)


def _flag_draws(rows: Sequence[RankedRun]) -> None:
    """Flag mixes whose epochs have another number of rows than those of most runs, where epochs decide how long a run trains."""
    draws = {row.run: sum(source.get("draws", 0) for source in (row.summary.get("sources") or {}).values()) for row in rows}
    usual = _usual(draws.values())
    for row in rows:
        if draws[row.run] != usual and not _positive(row.settings.get("trainer.max_steps", "")):
            row.flags.append(f"other amount of training: {draws[row.run]} rows an epoch, most {usual}; data.draws makes them equal")


def _positive(text: str) -> bool:
    return text.lstrip("+").isdigit() and int(text) > 0


def _reason(key: str) -> str | None:
    if key in HELD_OUT:
        return "other held-out rows"
    if key in ORDER:
        return "other order of data"
    if key in AMOUNT:
        return "other amount of training"
    if key == "collator._target_":
        return "its loss counts other labels"
    if key.startswith("collator.") and key != "collator.max_length":  # which refuses rows and changes none
        return "other prompts"
    return "other generation" if key.startswith("generation.") else None


def _usual(values: Iterable[object]) -> object:
    """The most frequent value, the first of them at a tie; None of nothing."""
    return next((value for value, _ in Counter(values).most_common(1)), None)


def _note_scale(board: Leaderboard, rows: Sequence[RankedRun]) -> None:
    """A sweep of the rank with a fixed lora_alpha also changes the adapter's scale."""
    scales = sorted({r.scale for r in rows if r.scale is not None})
    if "lora.r" in board.keys and len(scales) > 1 and not {"lora.lora_alpha", "lora.use_rslora"} & set(board.keys):
        stable = all(r.settings.get("lora.use_rslora") == "True" for r in rows)
        formula = "alpha / sqrt(r)" if stable else "alpha / r"
        advice = "by the rank-stabilised rule" if stable else "so ranks are not compared alone; `experiment=rank_sweep` keeps the scale fixed"
        board.notes.append(f"The rank also changes the effective scale {formula}, here from {scales[-1]:g} to {scales[0]:g}: {advice}.")
