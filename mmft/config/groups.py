"""The folders and groups of the configuration: conf/GROUP/OPTION.yaml."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf

CONFIG_DIR = Path(__file__).resolve().parents[2] / "conf"
if not CONFIG_DIR.is_dir():  # installed from a wheel: conf/ is the package mmft.conf
    CONFIG_DIR = Path(__file__).resolve().parents[1] / "conf"

GROUPS = ("task", "model", "collator", "data", "lora", "trainer", "logger", "metrics", "objective", "experiment")


def group_options(config_dir: str | None = None) -> dict[str, list[str]]:
    """group -> the names of its yaml files, shipped ones and those below `config_dir`. Names with a leading underscore are bases."""
    roots = [CONFIG_DIR] + ([Path(config_dir)] if config_dir else [])
    return {
        group: sorted({
            file.relative_to(root / group).with_suffix("").as_posix()
            for root in roots for file in (root / group).rglob("*.yaml") if not file.name.startswith("_")
        })
        for group in GROUPS
    }  # fmt: skip


def shipped_files() -> frozenset[tuple[str, int, int]]:
    """(path, time of its last change, bytes) of every shipped yaml file: another set after an edit."""
    stats = ((file, file.stat()) for file in CONFIG_DIR.rglob("*.yaml"))
    return frozenset((str(file), stat.st_mtime_ns, stat.st_size) for file, stat in stats)


def default_metrics_section() -> dict[str, Any]:
    """The section `metrics` that conf/metrics/text.yaml composes to, for configs from before this group existed."""
    folder = CONFIG_DIR / "metrics"
    names = content(folder / "text.yaml")["defaults"]
    return {key: copy.deepcopy(node) for name in names for key, node in content(folder / f"{name}.yaml").items()}


def top_level() -> list[str]:
    """The keys of conf/config.yaml."""
    return [key for key in content(CONFIG_DIR / "config.yaml") if key != "defaults"]


def verb_keys(verb: str) -> list[str]:
    """The keys of conf/task/VERB.yaml, which are typed without `task.`."""
    return [key for key in content(CONFIG_DIR / "task" / f"{verb}.yaml") if key != "_target_"]


def content(file: Path) -> Mapping[str, Any]:
    """The plain content of a shipped yaml file, read once in a process unless it is edited. To be read only."""
    stat = file.stat()
    return _content(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _content(file: Path, changed: int, size: int) -> Mapping[str, Any]:
    return cast("dict[str, Any]", OmegaConf.to_container(OmegaConf.load(file)))


def verbs() -> dict[str, str]:
    """verb -> one line about it: the first comment of conf/task/VERB.yaml."""
    return {f.stem: first_comment(f) for f in sorted((CONFIG_DIR / "task").glob("*.yaml"))}


def first_comment(path: Path) -> str:
    """The comment on a file's first line, or an empty string."""
    first = path.read_text(encoding="utf-8").splitlines()[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""
