"""benchmarks.json: results of public benchmarks, kept beside summary.json and read with it by leaderboards and lists of runs."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..common.files import read_json
from ..common.records import BenchmarkRecord, MetricInfo, Summary, TaskResult
from . import numbers
from .html import write_text

if TYPE_CHECKING:
    from rich.table import Table

FILE = "benchmarks.json"
PREFIX = "bench."  # bench.TASK.METRIC among the metrics of a run


def add(run: Path, measured: Mapping[str, Mapping[str, TaskResult]], limit: int | None, checkpoint: int | None) -> BenchmarkRecord:
    """Add results (side -> task -> result) to a run's file; tasks that were measured before are replaced."""
    record = read(run)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    for side, tasks in measured.items():
        for task, result in tasks.items():
            record.setdefault("tasks", {}).setdefault(task, {})[side] = {**result, "limit": limit, "checkpoint": checkpoint, "time": now}
    write_text(run / FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def read(run: Path) -> BenchmarkRecord:
    """A run's file; empty without one."""
    return cast(BenchmarkRecord, read_json(run / FILE))


def with_benchmarks(summary: Summary, run: Path) -> Summary:
    """A summary whose metrics also hold those of the benchmarks of the final adapter, as bench.TASK.METRIC."""
    tasks = read(run).get("tasks") or {}
    if not tasks:
        return summary
    sides: dict[str, dict[str, float]] = {"tuned": {}, "base": {}}
    infos: dict[str, MetricInfo] = {}
    for task, measured in tasks.items():
        for side, result in measured.items():
            if result.get("checkpoint") is not None or side not in sides:
                continue
            for metric, value in result["scores"].items():
                name = f"{PREFIX}{task}.{metric}"
                sides[side][name] = value
                infos[name] = {"label": f"{task}: {metric}", "higher_is_better": result["higher_is_better"].get(metric, True), "top": None}
    changed: Summary = {**summary}
    changed["metrics"] = {**(summary.get("metrics") or {}), **sides["tuned"]}
    changed["base_metrics"] = {**(summary.get("base_metrics") or {}), **sides["base"]}
    changed["metric_info"] = {**(summary.get("metric_info") or {}), **infos}
    return changed


def table(record: BenchmarkRecord) -> Table:
    """Task, metric, base (if measured), tuned."""
    from rich.text import Text

    from .terminal import new_table

    result = new_table("Benchmarks (lmms-eval)", ("task", "metric", "base", "tuned", "rows"))
    for task, sides in (record.get("tasks") or {}).items():
        tuned, base = sides.get("tuned"), sides.get("base")
        either = tuned or base
        for metric in either["scores"] if either else ():
            values = [numbers.metric(side["scores"].get(metric)) if side else numbers.MISSING for side in (base, tuned)]
            result.add_row(Text(task), Text(metric), *values, numbers.count(either["rows"] if either else None))
    return result
