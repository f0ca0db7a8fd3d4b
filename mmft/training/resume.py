"""A run that goes on where it was stopped: which checkpoint, what of its files still counts."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runs.directory import Run
from . import checkpoints

log = logging.getLogger("mmft")


@dataclass
class Resumed:
    """Where a run goes on: its directory, the checkpoint (None: from the start), the step it was made at."""

    run: Run
    checkpoint: Path | None
    step: int


def reopened(folder: Path) -> Resumed:
    """Open an unfinished run to go on with it; rows of its logs that lie behind the checkpoint are taken out, to be written again."""
    checkpoint = checkpoints.newest(folder / "checkpoints")
    step = int(checkpoint.name.removeprefix(checkpoints.PREFIX)) if checkpoint else 0
    kept: dict[str, Any] = json.loads((checkpoint / checkpoints.STATE).read_text(encoding="utf-8")) if checkpoint else {"seconds": 0.0, "files": {}}
    run = Run(folder)
    run.started -= kept["seconds"]
    for name in ("metrics.jsonl", "eval/samples.jsonl"):
        cut(run, name, kept["files"].get(name, 0))
    for name in ("summary.json", "log.txt")[: 1 if checkpoint else 2]:
        (folder / name).unlink(missing_ok=True)
    log.info("%-14s %s from %s", "resuming", folder, f"step {step}" if checkpoint else "the start: no checkpoint of it verifies")
    return Resumed(run, checkpoint, step)


def cut(run: Run, name: str, size: int) -> None:
    """Keep the first `size` bytes of a log: rows at the checkpoint's own step may have been written before it or behind it."""
    path = run / name
    if not path.is_file():
        return
    if (there := path.stat().st_size) < size:
        log.warning("%-14s %s has %d bytes and had %d at the checkpoint: rows of it are lost", "damaged", path, there, size)
    with path.open("rb+") as file:
        file.truncate(min(size, there))


def of_this_config(folder: Path, cfg: Any) -> bool:
    """Whether a directory holds a run, finished or not, of exactly this config."""
    from omegaconf import OmegaConf

    from ..config.identity import config_identity

    if not (folder / "snapshot.yaml").is_file():
        return False
    try:
        return config_identity(OmegaConf.load(folder / "snapshot.yaml")) == config_identity(cfg)
    except Exception:  # a torn snapshot: nothing to go on with
        return False
