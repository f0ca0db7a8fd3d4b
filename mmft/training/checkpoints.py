"""Checkpoints that are complete or absent: written beside, flushed, sealed by a manifest, renamed; the newest that verifies is resumed."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..common.hashing import sha256
from ..system.disk import folder_size, megabytes
from . import disk_space

log = logging.getLogger("mmft")

MANIFEST, STATE = "manifest.json", "mmft_state.json"
SAVING, REPLACED, DAMAGED = ".saving", ".replaced-", "damaged"
PREFIX = "checkpoint-"


def seal(folder: Path) -> None:
    """Flush every file to the disk, then write the manifest (name -> sha256, bytes), whole or not at all."""
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
    _sync(folder)


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, by its manifest; None when every file is what it was when it was sealed."""
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
    more = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST} - set(files)
    return f"{min(more)} is not in {MANIFEST}" if more else None  # transformers would read weights by other names, too


def all_in(home: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first, good or not."""
    found = [p for p in home.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


def newest(home: Path) -> Path | None:
    """The newest checkpoint that verifies. Newer ones that do not are moved to damaged/, each named with what is wrong.

    Nor does one serve whose best checkpoint so far (load_best_model_at_end) is gone or damaged: it would end with other weights.
    """
    shutil.rmtree(home / SAVING, ignore_errors=True)  # what a kill left half written
    for old in home.glob(f"{REPLACED}*"):
        final = home / f"{PREFIX}{old.name.removeprefix(REPLACED)}"
        shutil.rmtree(old) if final.is_dir() else os.replace(old, final)
    for folder in reversed(all_in(home)):
        wrong = problem(folder) or _lost_best(home, folder)
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


def save(trainer: Any, write: Callable[[], None]) -> None:
    """`write()` is transformers' own saving; here it writes into a folder beside, which is sealed and renamed.

    Errors raised: UserError when the disk lacks the bytes; the checkpoints that are there stay as they are.
    """
    home, step = Path(trainer.args.output_dir), trainer.state.global_step
    staged, final = home / SAVING / f"{PREFIX}{step}", home / f"{PREFIX}{step}"
    writes = trainer.args.should_save
    if writes:
        shutil.rmtree(home / SAVING, ignore_errors=True)
        staged.parent.mkdir(parents=True)
        need, free = disk_space.checkpoint_bytes(trainer, next(reversed(all_in(home)), None)), shutil.disk_usage(home).free
        if free < need:
            raise UserError(
                f"{home}: the checkpoint of step {step} needs {megabytes(need)} and {megabytes(free)} are free; earlier ones are untouched:"
                f" free some, and go on with mmft resume run={home.parent}"
            )
    trainer.staging = str(home / SAVING)
    trainer.accelerator.wait_for_everyone()  # each process adds its own random state
    try:
        write()
        trainer.accelerator.wait_for_everyone()
        if not writes:
            return
        (staged / "training_args.bin").unlink(missing_ok=True)  # a pickle, and it may hold a token
        _point_to_best(trainer, home, staged)
        (staged / STATE).write_text(json.dumps(trainer.own_state()), encoding="utf-8")
        seal(staged)
        old = home / f"{REPLACED}{step}"
        if final.exists():  # saved twice at one step; it may be the only one, so it stays until the new one is in its place
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(staged, final)
        _sync(home)
        shutil.rmtree(old, ignore_errors=True)
        rotate(home, final, trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
    except OSError as error:
        raise UserError(f"{home}: the checkpoint of step {step} could not be written: {error.strerror or error}; earlier ones are untouched") from None
    finally:
        trainer.staging = None
        if writes:
            shutil.rmtree(home / SAVING, ignore_errors=True)


def rotate(home: Path, latest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest beyond `limit`, only once the latest verifies; the best one stays."""
    if not limit or limit < 0 or problem(latest) is not None:
        return
    keep = {latest.name, Path(best).name if best else latest.name}
    old = [p for p in all_in(home) if p.name not in keep]
    for folder in old[: max(0, len(old) + len(keep) - max(limit, len(keep)))]:
        shutil.rmtree(folder, ignore_errors=True)


def _point_to_best(trainer: Any, home: Path, staged: Path) -> None:
    """trainer_state.json names the best checkpoint by its place after the renaming."""
    best = trainer.state.best_global_step
    if not best:
        return
    folder = home / f"{PREFIX}{best}"
    if folder.is_dir() or best == trainer.state.global_step:
        trainer.state.best_model_checkpoint = str(folder)
        trainer.state.save_to_json(str(staged / "trainer_state.json"))


def _lost_best(home: Path, folder: Path) -> str | None:
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8")) if (folder / "trainer_state.json").is_file() else {}
    name = Path(state["best_model_checkpoint"]).name if state.get("best_model_checkpoint") else folder.name
    wrong = problem(home / name) if name != folder.name else None
    return f"the best checkpoint it refers to, {name}, is damaged: {wrong}" if wrong else None


def flushed(folder: Path, names: tuple[str, ...]) -> dict[str, int]:
    """Bytes of the logs as they are at a checkpoint, and they are on the disk; 0 for one that is not there."""
    sizes = {}
    for name in names:
        path = folder / name
        sizes[name] = path.stat().st_size if path.is_file() else 0
        if sizes[name]:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    return sizes


def _sync(folder: Path) -> None:
    if os.name == "nt":  # no handle of a directory there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def bytes_on_disk(run: Path) -> int:
    """Bytes a run has on the disk already, of those that `needed` counts: checkpoints that were set aside as damaged are not among them."""
    from .checkpoints import DAMAGED

    return folder_size(run) - folder_size(run / "checkpoints" / DAMAGED)
