"""Reopen a run that was stopped: find its checkpoint, and cut its logs back to that step."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ..config.identity import config_identity
from ..runs.directory import Run
from . import checkpoints

log = logging.getLogger("mmft")


@dataclass
class Resumed:
    """Where a run goes on: its directory, the checkpoint (None: from the start), and the checkpoint's step."""

    run: Run
    checkpoint: Path | None
    step: int


def reopen(folder: Path) -> Resumed:
    """Open an unfinished run. Rows of its logs that come after the checkpoint are removed, because they are written again."""
    checkpoint = checkpoints.newest(folder / "checkpoints")
    step = checkpoints.step_of(checkpoint) if checkpoint else 0
    seconds, files = 0.0, dict[str, int]()
    if checkpoint:
        state = checkpoints.read_state(checkpoint)
        seconds, files = state["seconds"], state["files"]
    run = Run(folder)
    run.started -= seconds
    for name in ("metrics.jsonl", "eval/samples.jsonl"):
        cut(run, name, files.get(name, 0))
    for name in ("summary.json", "log.txt")[: 1 if checkpoint else 2]:
        (folder / name).unlink(missing_ok=True)
    log.info("%-14s %s from %s", "resuming", folder, f"step {step}" if checkpoint else "the start: no checkpoint of it verifies")
    return Resumed(run, checkpoint, step)


def cut(run: Run, name: str, size: int) -> None:
    """Keep the first `size` bytes of a log; its size at the checkpoint, because a row of that step may have come before or after it."""
    path = run / name
    if not path.is_file():
        return
    if (actual := path.stat().st_size) < size:
        log.warning("%-14s %s has %d bytes and had %d at the checkpoint: rows of it are lost", "damaged", path, actual, size)
    with path.open("rb+") as file:
        file.truncate(min(size, actual))


def is_run_of(folder: Path, cfg: DictConfig) -> bool:
    """Whether a directory holds a run, finished or not, of exactly this config."""
    if not (folder / "snapshot.yaml").is_file():
        return False
    try:
        snapshot = OmegaConf.load(folder / "snapshot.yaml")
        return isinstance(snapshot, DictConfig) and config_identity(snapshot) == config_identity(cfg)
    except Exception:  # a torn snapshot: there is nothing to go on with
        return False
