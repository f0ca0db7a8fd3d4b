"""Checkpoints that are complete or absent: staged, flushed, sealed by a manifest, renamed. A run resumes from the newest that verifies."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import TypedDict

from ..common.hashing import sha256
from ..system.disk import folder_size
from .meter import MeterState

log = logging.getLogger("mmft")

FORMAT = 2  # of mmft's state in a checkpoint
MANIFEST, STATE = "manifest.json", "mmft_state.json"
SAVING, REPLACED, DAMAGED = ".saving", ".replaced-", "damaged"
PREFIX = "checkpoint-"


class CheckpointState(TypedDict):
    """mmft_state.json: what the Trainer does not save.

    seconds: of the run. done: whether training was finished. files: bytes of the run's logs at this step. meter: training/meter.py.
    """

    format: int
    seconds: float
    done: bool
    files: dict[str, int]
    meter: MeterState


def seal(folder: Path) -> None:
    """Flush every file to the disk, then write the manifest (name -> sha256, bytes) atomically."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.relative_to(folder).as_posix()] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    beside = folder / f".{MANIFEST}"
    with beside.open("w", encoding="utf-8") as file:
        json.dump({"format": 1, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, folder / MANIFEST)
    sync(folder)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if every file equals its entry in the manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, known in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != known["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {known['bytes']}"
            if sha256(path) != known["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    extra = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST} - set(files)
    if extra:
        return f"{min(extra)} is not in {MANIFEST}"  # transformers would read weights under other names too
    return None


def all_in(home: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first, good or not."""
    found = [p for p in home.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint was made at."""
    return int(checkpoint.name.removeprefix(PREFIX))


def newest(home: Path) -> Path | None:
    """The newest checkpoint that verifies. Newer ones are moved to damaged/, with a warning that says what is wrong.

    A checkpoint whose best checkpoint so far (load_best_model_at_end) is missing or damaged is not used either: the run would end
    with other weights.
    """
    shutil.rmtree(home / SAVING, ignore_errors=True)  # left half written by a killed process
    for old in home.glob(f"{REPLACED}*"):
        final = home / f"{PREFIX}{old.name.removeprefix(REPLACED)}"
        shutil.rmtree(old) if final.is_dir() else os.replace(old, final)
    for folder in reversed(all_in(home)):
        wrong = problem(folder) or _other_format(folder) or _lost_best(home, folder)
        if wrong is None:
            return folder
        aside = home / DAMAGED / folder.name
        n = 1
        while aside.exists():
            n += 1
            aside = home / DAMAGED / f"{folder.name}-{n}"
        aside.parent.mkdir(exist_ok=True)
        os.replace(folder, aside)
        log.warning("%-14s %s: %s; it is moved to %s", "damaged", folder, wrong, aside)
    return None


def read_state(checkpoint: Path) -> CheckpointState:
    """mmft's own state in a checkpoint."""
    state: CheckpointState = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return state


def write_state(checkpoint: Path, state: CheckpointState) -> None:
    """Write mmft's own state into a checkpoint, which is sealed afterwards."""
    (checkpoint / STATE).write_text(json.dumps(state), encoding="utf-8")


def rotate(home: Path, latest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond `limit`, if the latest verifies; the best one stays."""
    if not limit or limit < 0 or problem(latest) is not None:
        return
    keep = {latest.name, Path(best).name if best else latest.name}
    old = [p for p in all_in(home) if p.name not in keep]
    for folder in old[: max(0, len(old) + len(keep) - max(limit, len(keep)))]:
        shutil.rmtree(folder, ignore_errors=True)


def _other_format(folder: Path) -> str | None:
    try:
        return None if read_state(folder)["format"] == FORMAT else f"{STATE} is of another version of mmft"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE} is missing or of another version of mmft"


def _lost_best(home: Path, folder: Path) -> str | None:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")) if (folder / "trainer_state.json").is_file() else {}
    name = Path(state["best_model_checkpoint"]).name if state.get("best_model_checkpoint") else folder.name
    wrong = problem(home / name) if name != folder.name else None
    return f"the best checkpoint it refers to, {name}, is damaged: {wrong}" if wrong else None


def flushed(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Flush the logs to the disk and return their sizes in bytes; 0 for a file that does not exist."""
    sizes = {}
    for name in names:
        path = folder / name
        sizes[name] = path.stat().st_size if path.is_file() else 0
        if sizes[name]:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    return sizes


def sync(folder: Path) -> None:
    """Flush a directory's entries to the disk."""
    if os.name == "nt":  # Windows has no handle of a directory
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bytes_on_disk(run: Path) -> int:
    """Bytes of a run's files, without checkpoints that were set aside as damaged."""
    return folder_size(run) - folder_size(run / "checkpoints" / DAMAGED)
