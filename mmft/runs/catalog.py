"""The catalog: every run below a folder, read from its small files alone; which run a short name stands for."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig

from ..common.errors import UserError, nearest
from ..common.files import read_json, read_text
from ..common.records import Environment, MetricInfo, Summary
from ..config.ranking import ranking
from ..reports.benchmarks import with_benchmarks

SKIPPED = ("data", "cache", "earlier")  # prepared sets, image features, and former attempts of a sweep's points
TAGS = "tags.json"
FACTS = ("status", "name", "seconds", "steps", "samples_per_second", "eval_loss", "base_eval_loss", "trainable_parameters", "peak_memory_mb",
         "held_out_samples", "data_fingerprint", "reason", "method")  # fmt: skip


@dataclass
class CatalogRun:
    """A run directory. name: its path below the folder that was searched."""

    path: Path
    name: str

    @cached_property
    def summary(self) -> Summary:
        return with_benchmarks(cast(Summary, read_json(self.path / "summary.json")), self.path)

    @cached_property
    def environment(self) -> Environment:
        return cast(Environment, read_json(self.path / "env.json"))

    @cached_property
    def _snapshot(self) -> str:
        return read_text(self.path / "snapshot.yaml") or ""

    @cached_property
    def tags(self) -> list[str]:
        return [str(tag) for tag in read_json(self.path / TAGS).get("tags") or ()]

    @property
    def status(self) -> str:
        return str(self.summary.get("status") or "unfinished")

    @cached_property
    def started(self) -> float:
        """Seconds since the epoch, when the run's config was written."""
        return (self.path / "snapshot.yaml").stat().st_mtime

    @cached_property
    def words(self) -> dict[str, str]:
        """key -> value of the command that started the run."""
        lines = (read_text(self.path / "overrides.txt") or "").splitlines()
        return {key: value for key, sign, value in (line.partition("=") for line in lines) if sign}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The whole config; {} if snapshot.yaml is torn."""
        return _load(self._snapshot)

    @property
    def metrics(self) -> dict[str, float]:
        return self.summary.get("metrics") or {}

    @property
    def objective(self) -> tuple[str, bool]:
        """(the score that ranks this run, whether higher is better): the key `rank_by`, if it was measured, else eval_loss."""
        name = ranking({key: self.setting(key) for key in ("rank_by", "objective")})
        info: dict[str, MetricInfo] = self.summary.get("metric_info") or {}
        return (name, bool(info[name]["higher_is_better"])) if name in info else ("eval_loss", False)

    def value(self, key: str) -> Any:
        """What a column or a condition calls `key`: a fact of the summary, a metric (base.METRIC: the base model's), or a key of the config.

        None if the run has no such value.
        """
        if key in ("run", "path"):
            return self.name
        if key == "tags":
            return self.tags
        if key in self.metrics:
            return self.metrics[key]
        if key in FACTS:
            return self.summary.get(key) if key != "status" else self.status
        head, _, rest = key.partition(".")
        if head == "base" and rest:
            return (self.summary.get("base_metrics") or {}).get(rest)
        return self.setting(key)

    def setting(self, key: str) -> Any:
        """The value of a dotted key of the config. Only the section that holds it is parsed: thousands of configs take a while."""
        section = _section(self._snapshot, key.split(".")[0])
        value: Any = self.config if section is None else section
        for piece in key.split("."):
            value = value.get(piece) if isinstance(value, Mapping) else None
        return value

    def size(self) -> int:
        """Bytes on the disk; a file with several names (hard links) counts once."""
        seen: dict[tuple[int, int], int] = {}
        for folder, _, files in os.walk(self.path):
            for name in files:
                stat = os.lstat(os.path.join(folder, name))
                seen[(stat.st_dev, stat.st_ino)] = stat.st_size
        return sum(seen.values())


def catalog(folder: Path) -> list[CatalogRun]:
    """All runs at any depth, the newest first; folders named in SKIPPED, hidden ones, and those inside a run are not entered."""
    return sorted((CatalogRun(path, path.relative_to(folder).as_posix()) for path in _walk(folder)), key=lambda run: (-run.started, run.name))


def find_run(word: str, output_dir: str | Path) -> Path:
    """The directory that `run=WORD` means: an existing path, `last`, `best`, or the beginning of the name of one run below output_dir.

    best: of the runs with the data and the objective of the last finished one. Raises UserError if there is none, or several.
    """
    if Path(word).exists():
        return Path(word)
    runs = catalog(Path(output_dir))
    if word in ("last", "best"):
        finished = [run for run in runs if run.status == "finished"]
        if not finished:
            raise UserError(f"run={word}: no finished run below {output_dir}; output_dir=... names another folder")
        return (finished[0] if word == "last" else best_of(finished)).path
    matches = [run for run in runs if run.name.startswith(word) or run.path.name.startswith(word)]
    exact = [run for run in matches if word in (run.name, run.path.name)]
    if len(exact or matches) == 1:
        return (exact or matches)[0].path
    if matches:
        shown = ", ".join(run.name for run in matches[:5]) + (", ..." if len(matches) > 5 else "")
        raise UserError(f"run={word}: {len(matches)} runs below {output_dir} begin like this: {shown}; type more of the name")
    near = [p.name for p in Path(word).parent.iterdir()] if Path(word).parent.is_dir() else []
    hint = nearest(Path(word).name, [*near, *(run.name for run in runs), *(run.path.name for run in runs), "last", "best"])
    raise UserError(f"run={word}: no such directory, and no run below {output_dir} begins like this.{hint}")


def best_of(finished: list[CatalogRun]) -> CatalogRun:
    """The best of the finished runs (newest first) that have the objective and the held-out data of the newest. Raises UserError."""
    objective, higher = finished[0].objective
    data = finished[0].summary.get("data_fingerprint")
    rivals = [r for r in finished if r.objective[0] == objective and r.summary.get("data_fingerprint") == data and r.value(objective) is not None]
    if not rivals:
        raise UserError(f"run=best: {finished[0].name} has no {objective}, so there is nothing to compare by; name the run")
    return min(rivals, key=lambda r: (-1 if higher else 1) * r.value(objective))


def resolve_names(task: DictConfig, output_dir: str) -> dict[str, str]:
    """Replace short names in a verb's `run` and `against` by the directories they mean; {what was typed: directory}. Raises UserError."""
    found: dict[str, str] = {}

    def resolved(word: str) -> str:
        path = find_run(word, output_dir)
        if path != Path(word):
            found[word] = path.as_posix()
        return found.get(word, word)

    for key in ("run", "against"):
        value = task.get(key)
        if isinstance(value, str):
            task[key] = resolved(value)
        elif value is not None:
            task[key] = [resolved(str(word)) for word in value]
    return found


def write_tags(run: Path, tags: Iterable[str]) -> None:
    """Write the tags of a run, or remove the file if there are none."""
    chosen = sorted(set(tags))
    if chosen:
        (run / TAGS).write_text(json.dumps({"tags": chosen}, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
    else:
        (run / TAGS).unlink(missing_ok=True)


def _walk(folder: Path) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    if any(entry.name == "snapshot.yaml" for entry in entries):
        yield folder
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False) and entry.name not in SKIPPED and not entry.name.startswith("."):
            yield from _walk(Path(entry.path))


def _section(text: str, name: str) -> dict[str, Any] | None:
    """One top-level key of a snapshot with what is indented below it; None if it is not found as mmft writes it."""
    match = re.search(rf"^{re.escape(name)}:.*\n(?:[ \-#].*\n|\n)*", text, re.MULTILINE)
    return _load(match.group()) if match else None


def _load(text: str) -> dict[str, Any]:
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        value = loader.get_single_data()
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}
