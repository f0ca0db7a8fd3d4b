"""The leaderboard of a folder of runs: read what differs between them and how good each is, from their files alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

from ..common.errors import UserError, nearest
from ..common.files import read_json, read_jsonl, read_text, read_yaml
from ..common.records import AnswerRecord, Difference, PlanReport, Summary, SweepPlan
from ..config.keep import split_name
from ..evaluation.metrics.base import MetricSet
from ..evaluation.metrics.defaults import metric_set
from ..evaluation.resampling import LOSS, differences
from . import numbers
from .benchmarks import with_benchmarks
from .lineage import lineage, steps_before
from .numbers import is_number
from .ranking import Leaderboard, RankedRun, flag_conditions, mark, mark_noise, seed_groups
from .run_files import flatten
from .tables import info_of, main_kept, main_metrics, metric_names

NOT_COMPARED = ("run_dir", "name", "output_dir", "rank_by")  # they differ between any two runs, or change no result
IGNORED_FOLDERS = ("earlier",)  # of a sweep: former attempts of points that were repeated


def read(folder: Path, by: str | None = None) -> Leaderboard:
    """The runs one or two folders below `folder`, the best by `by` first. Raises UserError if there are none or `by` was not measured."""
    runs = sorted({p.parent for pattern in ("*/snapshot.yaml", "*/*/snapshot.yaml") for p in folder.glob(pattern)})
    runs = [run for run in runs if run.relative_to(folder).parts[0] not in IGNORED_FOLDERS]
    if not runs:
        raise UserError(f"run={folder}: holds no run (no snapshot.yaml here, nor one or two folders below)")
    plan = cast(SweepPlan, read_json(folder / "plan.json"))
    summaries = [with_benchmarks(cast(Summary, read_json(run / "summary.json")), run) for run in runs]
    by = _ranking_value(by, runs, summaries, plan)
    settings = [dict(flatten(read_yaml(run / "snapshot.yaml"))) for run in runs]
    differing = [k for k in {k: 0 for s in settings for k in s} if k not in NOT_COMPARED and len({s.get(k) for s in settings}) > 1]
    overrides = [_overrides(run) for run in runs]
    keys = _columns(differing, overrides, bool(plan))
    rows = []
    for run, summary, own_settings, words in zip(runs, summaries, settings, overrides, strict=True):
        plan_report = cast(PlanReport, read_json(run / "lora_plan.json"))
        scales = {scale for r in plan_report.get("rows") or () if is_number(scale := r.get("scale"))}
        rows.append(RankedRun(
            run=run.relative_to(folder).as_posix(), path=run, status=str(summary.get("status") or "unfinished"),
            values=[words.get(k, own_settings.get(k, "")) for k in keys], score=_value(summary, by), base=_value(summary, by, base=True),
            loss=summary.get("eval_loss"), trainable=summary.get("trainable_parameters"), scale=max(scales) if scales else None,
            memory=summary.get("peak_memory_mb"), seconds=summary.get("seconds"), speed=summary.get("samples_per_second"),
            metrics=summary.get("metrics") or {}, reason=str(summary.get("reason") or ""), report=(run / "report.html").is_file(),
            settings=own_settings, summary=summary,
        ))  # fmt: skip
    shown = [k for k in differing if not k.startswith(("logger", "task"))]
    recorded = {name: one for s in summaries for name, one in (s.get("metric_info") or {}).items()}
    info = info_of(by, recorded)
    label, higher = ("Held-out loss", False) if by == "eval_loss" else (info["label"], info["higher_is_better"])
    labels = {name: info_of(name, recorded)["label"] for name in metric_names([s.get("metrics") or {} for s in summaries])}
    board = Leaderboard(folder.resolve().name, by, label, higher, labels, bool(plan), keys, rows, shown)
    rows.sort(key=lambda r: (not is_number(r.score), board.sign * r.score if is_number(r.score) else 0, r.loss if is_number(r.loss) else 1e9, r.run))
    missing = [p["name"] for p in plan.get("points") or () if not (folder / p["name"]).is_dir()]
    if missing:
        board.notes.append(f"{len(missing)} planned points have no run yet: {', '.join(missing[:8])}{' ...' if len(missing) > 8 else ''}")
    board.kept = [name for name in labels if split_name(name)]
    sets = dict.fromkeys(found[0] for found in map(split_name, board.kept) if found)
    board.main_kept = [main_kept(board.kept, kept) for kept in sets]
    board.groups = seed_groups(board)
    flag_conditions(board)
    _flag_ancestors(board)
    mark(board)
    if not board.groups:
        mark_noise(board, _gaps_to_best(board))
    _note_rows(board)
    return board


def _gaps_to_best(board: Leaderboard) -> dict[str, Difference]:
    """run -> its score minus the best one's, on the rows of both; {} where answers or metrics cannot be read."""
    ranked = [row for row in board.finished if is_number(row.score)]
    if len(ranked) < 2:
        return {}
    kept, score = split_name(board.by) or (None, board.by)
    file = f"eval/keep/{kept}_tuned.jsonl" if kept else "eval/tuned.jsonl"
    answers = [cast("list[AnswerRecord]", read_jsonl(row.path / file)) for row in ranked]
    snapshot = read_yaml(ranked[0].path / "snapshot.yaml")
    name, _, source = score.partition("/")
    try:
        if name in ("loss", LOSS):
            metrics, score = MetricSet({}), f"loss/{source}" if source else LOSS
        else:
            section = snapshot["evaluation"]["keep"][kept]["metrics"] if kept else snapshot.get("metrics")
            metrics = metric_set(section).only(name)
    except (UserError, KeyError, TypeError) as error:
        board.notes.append(f"No interval of the differences: {error}.")
        return {}
    found = [(row.run, differences(metrics, answers[0], own).get(score)) for row, own in zip(ranked[1:], answers[1:], strict=True)]
    return {run: gap for run, gap in found if gap}


def _flag_ancestors(board: Leaderboard) -> None:
    """Flag runs whose adapter was trained for other numbers of steps before, and name what runs build on."""
    before = {row.run: steps_before(row.path) for row in board.finished}
    for row in board.finished:
        if len(set(before.values())) > 1 and before[row.run]:
            row.flags.append(f"other amount of training: its adapter had {before[row.run]} steps before")
        if ancestors := lineage(row.path):
            board.notes.append(f"{row.run} builds on " + ", ".join(f"{a['name']} ({a['what']})" for a in ancestors) + ".")


def _note_rows(board: Leaderboard) -> None:
    """How many references the rows have, and what the base model scored on each kept set."""
    references = {r.counts["references_per_row"] for r in board.finished if r.counts}
    if references:
        low, high = min(references), max(references)
        board.notes.append(f"References per row: {low:g}{f' to {high:g}' if high > low else ''}.")
    for name in board.main_kept:
        before = {numbers.metric(r.summary["base_metrics"][name]) for r in board.rows if is_number((r.summary.get("base_metrics") or {}).get(name))}
        if before:
            board.notes.append(f"Kept, {board.labels[name]}, before training: {' or '.join(sorted(before))}.")


def _ranking_value(by: str | None, runs: Sequence[Path], summaries: Sequence[Summary], plan: SweepPlan) -> str:
    measured = metric_names([{k: v for k, v in (s.get("metrics") or {}).items() if is_number(v)} for s in summaries])
    if by is None:
        objective = plan.get("objective")
        if objective in (*measured, "eval_loss"):
            return str(objective)
        answers = next((rows for run in runs if (rows := cast("list[AnswerRecord]", read_jsonl(run / "eval" / "tuned.jsonl")))), [])
        return main_metrics(answers, measured)[0] if measured else "eval_loss"
    if by not in (*measured, "eval_loss"):
        raise UserError(f"by={by}: none of these runs measured it.{nearest(by, [*measured, 'eval_loss'])} There are: {', '.join([*measured, 'eval_loss'])}.")
    return by


def _columns(differing: list[str], overrides: Sequence[dict[str, str]], swept: bool) -> list[str]:
    """The settings shown as columns: of a sweep the words that differ (what follows from them is listed apart), else all that differ."""
    if not swept:
        return differing
    words = {k: 0 for one in overrides for k in one}
    return [k for k in words if k not in NOT_COMPARED and len({one.get(k) for one in overrides}) > 1] or differing


def _overrides(run: Path) -> dict[str, str]:
    words = (read_text(run / "overrides.txt") or "").splitlines()
    return {w.split("=", 1)[0]: w.split("=", 1)[1] for w in words if "=" in w}


def _value(summary: Summary, key: str, base: bool = False) -> float | None:
    if key == "eval_loss":
        return summary.get("base_eval_loss") if base else summary.get("eval_loss")
    return ((summary.get("base_metrics") if base else summary.get("metrics")) or {}).get(key)
