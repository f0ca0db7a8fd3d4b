"""Which runs build on a run: by what they recorded of their parents, without reading weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.files import read_json
from .catalog import CatalogRun

# what a run cannot do without the run that it builds on, by the role of that one (runs/parents.py)
NEEDED_FOR = {
    "start": "started from it (lora.start)", "below": "was trained over it (model.adapters) and cannot be opened without it",
    "extended": "goes on with its training", "combined": "combines it",
}  # fmt: skip


def built_on(run: CatalogRun, others: Iterable[CatalogRun]) -> list[tuple[CatalogRun, str]]:
    """(another run, what it needs this one for) of the runs that build on it: by what they recorded, or before that by their configs.

    A run is known by its path, and where it was moved by its name and the hash of its weights.
    """
    own, found = run.path.resolve(), []
    for other in others:
        if other.path.resolve() == own:
            continue
        records = other.environment.get("parents") or []
        roles = [record.get("role", "") for record in records if _names(record.get("path"), own) or record.get("run") == own.name and _same_weights(run, record.get("sha256"))]
        if not records:
            words = {"start": [other.setting("lora.start")], "below": other.setting("model.adapters") or [], "extended": [_extended_by(other)]}
            roles = [role for role, paths in words.items() if any(_names(path, own) for path in paths)]
        if roles:
            found.append((other, NEEDED_FOR.get(roles[0], "builds on it")))
    return found


def _names(path: Any, run: Path) -> bool:
    """Whether a recorded path is that of a run, or of its adapter or a checkpoint below it."""
    return isinstance(path, str) and bool(path) and Path(path).resolve().is_relative_to(run)


def _extended_by(run: CatalogRun) -> Any:
    return (read_json(run.path / "parent.json").get("extended") or {}).get("path")


def _same_weights(run: CatalogRun, sha256: Any) -> bool:
    if not (run.path / "adapter").is_dir():
        return False
    from .weights import adapter_hash

    try:
        return adapter_hash(run.path / "adapter") == sha256
    except UserError:  # torn: nothing can be built on it
        return False
