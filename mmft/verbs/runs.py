"""`mmft runs`: list every run below a folder, compare two, tag and delete them."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from ..common.errors import UserError, nearest
from ..reports import runs_list, terminal
from ..reports.numbers import is_number
from ..reports.run_files import flatten
from ..reports.runs_list import Differences, ListedRun, RunsList
from ..runs.catalog import CatalogRun, catalog, find_run, write_tags
from ..runs.children import built_on
from ..runs.condition import parse_condition
from ..runs.directory import Run

log = logging.getLogger("mmft")
MAX_NAMED = 5  # runs that build on one that is deleted


@dataclass
class Runs:
    """The keys of conf/task/runs.yaml."""

    folder: str | None = None
    where: str | None = None
    by: str | None = None
    show: list[str] = field(default_factory=list)
    top: int | None = None
    disk: bool = False
    diff: list[str] | None = None
    tag: list[str] | None = None
    untag: list[str] | None = None
    delete: bool = False
    force: bool = False
    parents: bool = False
    run: list[str] | str = field(default_factory=list)
    out: str | None = None
    all_metrics: bool = False  # a column for every metric that a listed run has

    def __call__(self, cfg: DictConfig, overrides: list[str]) -> RunsList | Differences | None:
        """The list, or how two runs differ; None after a change. Raises UserError."""
        folder = Path(self.folder or cfg.output_dir)
        named = [self.run] if isinstance(self.run, str) else [str(word) for word in self.run]
        if self.diff is not None:
            return self._compare(cfg.output_dir)
        if self.delete or self.tag or self.untag:
            if not named:
                raise UserError(f"{'delete' if self.delete else 'tag'}: name the runs, e.g. run=[{self._example(folder)}]")
            chosen = [_opened(Path(word)) for word in named]
            if self.delete:
                self._check_parents(chosen, {Path(cfg.output_dir), folder})
            (self._delete if self.delete else self._tag)(chosen)
            return None
        if named:
            raise UserError(f"run={','.join(named)}: what shall be done with it? Add tag=[NAME] or delete=true, or compare two with diff=[A,B]")
        listed = self.list_runs(folder)
        terminal.show(runs_list.table(listed))
        if self.out is not None:
            path = Path(self.out)
            if path.suffix not in runs_list.FORMATS:
                raise UserError(f"out={self.out}: the list is written as {', '.join(runs_list.FORMATS)}; end the name with one of them")
            path.parent.mkdir(parents=True, exist_ok=True)
            log.info("%-14s %s", "list", runs_list.write(listed, path))
        return listed

    # --- the list -----------------------------------------------------------------------------------------------

    def list_runs(self, folder: Path) -> RunsList:
        """The runs below a folder that meet the condition, with the columns that were chosen. Raises UserError."""
        if not folder.is_dir():
            raise UserError(f"folder={folder}: no such directory; output_dir=... or folder=... names where the runs are")
        runs = found = catalog(folder)
        if not found:
            raise UserError(f"folder={folder}: holds no run (no snapshot.yaml at any depth); folder=... names another")
        if self.where is not None:
            condition = parse_condition(self.where)
            runs = [run for run in runs if condition(run.value)]
        if self.by is not None:
            runs = _sorted(runs, self.by, found)
        runs = runs[: self.top] if self.top is not None else runs
        columns = self._columns(runs)
        for column in self.show:
            if column not in ("started", "disk") and all(run.value(column) is None for run in found):
                raise UserError(f"show={column}: no run below {folder} has it.{nearest(column, _keys(found))}")
        rows = [ListedRun(run.name, run.path, [_cell(run, column) for column in columns], (run.path / "report.html").is_file()) for run in runs]
        chosen = [column for column in columns if column in (*map(str, self.show), self.by)]
        return RunsList(folder, columns, chosen, rows, self.by or "", len(found))

    def _columns(self, runs: Sequence[CatalogRun]) -> list[str]:
        """started, status, what is sorted by, the loss, the time; tags and disk if there are any; then the columns of show=."""
        columns = ["started", "status", *([self.by] if self.by else []), "eval_loss", "seconds"]
        columns += ["tags"] if any(run.tags for run in runs) else []
        columns += ["disk"] if self.disk else []
        columns += [metric for run in runs for metric in run.metrics] if self.all_metrics else []
        return list(dict.fromkeys([*columns, *map(str, self.show)]))

    def _example(self, folder: Path) -> str:
        return next((run.name for run in catalog(folder)), "DIR") if folder.is_dir() else "DIR"

    # --- two runs -----------------------------------------------------------------------------------------------

    def _compare(self, output_dir: str) -> Differences:
        words = list(map(str, self.diff or ()))
        if len(words) != 2:
            raise UserError(f"diff={words}: name two runs, diff=[A,B]")
        a, b = (_opened(find_run(word, output_dir)) for word in words)
        names = [a.name, b.name]
        ours, theirs = dict(flatten(a.config)), dict(flatten(b.config))
        config = {k: (ours.get(k), theirs.get(k)) for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k) and k not in ("run_dir", "output_dir", "name")}
        metrics: dict[str, tuple[Any, Any]] = {"eval_loss": (a.summary.get("eval_loss"), b.summary.get("eval_loss"))}
        metrics |= {k: (a.metrics.get(k), b.metrics.get(k)) for k in dict.fromkeys([*a.metrics, *b.metrics])}
        found = Differences(names, config, _different(_conditions(a), _conditions(b)), metrics)
        terminal.show(
            runs_list.difference_table("Config", names, found.config),
            runs_list.difference_table("Data and versions", names, found.conditions),
            runs_list.difference_table("Held-out scores", names, found.scores),
        )
        return found

    # --- changes ------------------------------------------------------------------------------------------------

    def _tag(self, runs: Sequence[CatalogRun]) -> None:
        for run in runs:
            tags = [tag for tag in [*run.tags, *map(str, self.tag or ())] if tag not in map(str, self.untag or ())]
            write_tags(run.path, tags)
            log.info("%-14s %s: %s", "tags", run.path, ", ".join(sorted(set(tags))) or "none")

    def _check_parents(self, runs: Sequence[CatalogRun], folders: set[Path]) -> None:
        """Raises UserError if a run below these folders that stays builds on one that would go, unless `parents` allows it."""
        going = {run.path.resolve() for run in runs}
        staying = {path: run for folder in folders if folder.is_dir() for run in catalog(folder) if (path := run.path.resolve()) not in going}
        for run in runs:
            needed = built_on(run, staying.values())
            for other, why in needed[: MAX_NAMED if self.parents else 0]:
                log.warning("%-14s %s %s", "needed", other.path, why)
            if needed and not self.parents:
                other, why = needed[0]
                more = f", and {len(needed) - 1} more runs build on it" if len(needed) > 1 else ""
                raise UserError(f"run={run.path}: {other.path} {why}{more}; nothing was deleted. Name these runs, too, or parents=true deletes it all the same")

    def _delete(self, runs: Sequence[CatalogRun]) -> None:
        for run in runs:
            if run.status != "finished":
                raise UserError(f"run={run.path}: {run.status}, and only finished runs are deleted here; resume it, or remove the directory yourself")
        sizes = [run.size() for run in runs]
        for run, size in zip(runs, sizes, strict=True):
            swept = "; a point of a sweep, which trains it again if its command is repeated" if (run.path.parent / "plan.json").is_file() else ""
            log.info("%-14s %s, %s%s", "delete", run.path, runs_list.text("disk", size), swept)
        if not self.force and not _confirmed(len(runs)):
            raise UserError("nothing was deleted; force=true deletes without a question")
        for run in runs:
            with Run(run.path).locked():
                shutil.rmtree(run.path)
        log.info("%-14s %d runs, %s", "deleted", len(runs), runs_list.text("disk", sum(sizes)))


def _opened(path: Path) -> CatalogRun:
    if not (path / "snapshot.yaml").is_file():
        raise UserError(f"run={path}: holds no snapshot.yaml, so it is not a run directory of mmft")
    return CatalogRun(path, path.name)


def _confirmed(n: int) -> bool:
    if not sys.stdin.isatty():
        raise UserError("delete=true: there is no terminal to ask on; force=true deletes without a question")
    return input(f"Delete {n} run{'s' * (n != 1)} for good? [y/N] ").strip().lower() in ("y", "yes")


def _sorted(runs: Sequence[CatalogRun], by: str, found: Sequence[CatalogRun]) -> list[CatalogRun]:
    """Those with a number first, the best of them at the top."""
    if not any(is_number(run.value(by)) for run in found):
        raise UserError(f"by={by}: no run has such a number.{nearest(by, _keys(found))}")
    infos = [info[by] for run in found if by in (info := run.summary.get("metric_info") or {})]
    higher = bool(infos) and bool(infos[0]["higher_is_better"])
    return sorted(runs, key=lambda run: (not is_number(run.value(by)), (-1 if higher else 1) * run.value(by) if is_number(run.value(by)) else 0))


def _keys(runs: Sequence[CatalogRun]) -> list[str]:
    """What the newest runs have, to suggest from."""
    keys = dict.fromkeys(key for run in runs[:20] for key in (*run.metrics, *map(str, run.summary), *(key for key, _ in flatten(run.config))))
    return [*keys, "started", "disk", "tags"]


def _cell(run: CatalogRun, column: str) -> Any:
    if column == "started":
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(run.started))
    return run.size() if column == "disk" else run.value(column)


def _conditions(run: CatalogRun) -> dict[str, Any]:
    """What of a run's data, versions and machine may explain a difference."""
    kept = {"data": run.summary.get("data_fingerprint"), "held-out rows": run.summary.get("held_out_samples")}
    env = dict(flatten({k: v for k, v in run.environment.items() if k in ("mmft", "code", "python", "packages", "device", "dtype", "attention", "model", "hardware")}))
    return kept | env


def _different(a: dict[str, Any], b: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {k: (a.get(k), b.get(k)) for k in dict.fromkeys([*a, *b]) if a.get(k) != b.get(k)}
