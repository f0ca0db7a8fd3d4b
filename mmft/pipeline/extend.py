"""Extend a finished run: a new run that goes on at its last step, with the schedule of the longer training."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from ..adapters.convert import changes_base
from ..common.errors import UserError
from ..common.files import read_json, read_jsonl
from ..common.records import Summary
from ..config.build import build
from ..config.plain import resolved
from ..config.settings import Settings
from ..config.snapshot import snapshot
from ..runs.base_model import locate_base
from ..runs.directory import Run
from ..runs.parents import EXTENDED, check_unchanged, extension_of
from ..runs.weights import trained_weights
from ..training import checkpoints
from ..training.arguments import training_settings
from ..training.meter import MeterState

log = logging.getLogger("mmft")

AMOUNT = ("trainer.num_train_epochs", "trainer.max_steps")  # the keys by which a run is extended
NEED_STATE = ("reduce_lr_on_plateau", "greedy")  # schedules that do not follow from the number of the step
# What the new run takes over: the measurement of the base, which is the same model on the same rows.
COPIED = ("base.json", "eval/base.jsonl", "keep/*_base.json", "eval/keep/*_base.jsonl")


def begin_extension(parent: Run, cfg: DictConfig, words: list[str], about: Mapping[str, Any]) -> Run:
    """Create the run that continues `parent`, with a checkpoint of the parent's last step; training cfg into it then resumes.

    cfg: the parent's config with more steps or epochs; its run_dir, which may name the new directory, is filled in. about: further
    content of parent.json. Raises UserError before anything is written if the run cannot go on.
    """
    settings = resolved(cfg)
    summary = cast("Summary", read_json(parent / "summary.json"))
    steps = int(summary.get("steps") or 0)
    check_unchanged(parent, settings["output_dir"])
    locate_base(build(cfg.model, "model"), parent.read_json("env.json")["model"], parent.path)
    newest = checkpoints.newest(parent / "checkpoints")
    last = newest if newest is not None and checkpoints.step_of(newest) == steps else None
    if last is None:
        _check_without_state(parent, settings, summary)
    name = [cfg.name or parent.name, "" if cfg.name else "extended"]
    child = Run.create(settings["output_dir"], name, settings["run_dir"])
    home = child / "checkpoints"
    home.mkdir()
    if last is not None:
        _copy_checkpoint(last, home)
    else:
        _make_checkpoint(parent, home / f"{checkpoints.PREFIX}{steps}", settings, summary)
        if not str(settings["trainer"].get("optim") or "adamw").startswith("sgd"):
            log.info("%-14s %s saved no checkpoint of its last step, so the optimizer's moments begin anew", "optimizer", parent.path)
    for pattern in COPIED:
        for file in parent.path.glob(pattern):
            (child / file.relative_to(parent.path).as_posix()).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, child / file.relative_to(parent.path).as_posix())
    _copy_logs(parent, child, home / f"{checkpoints.PREFIX}{steps}", whole=last is None)
    record = extension_of(parent.path)
    child.write_json("parent.json", {"run": parent.name, "path": parent.path.as_posix(), **about, EXTENDED: record})
    child.write_text("overrides.txt", "".join(f"{word}\n" for word in words))
    cfg.run_dir = child.path.as_posix()
    child.write_text("snapshot.yaml", snapshot(cfg))  # last: from here on the directory is a run that can be resumed
    return child


def _check_without_state(parent: Run, settings: Settings, summary: Summary) -> None:
    """Raises UserError for a run whose last step cannot be rebuilt from what it saved at its end."""
    trainer, where = settings["trainer"], f"run={parent.path}"
    advice = "trainer.save_strategy=steps saves it next time; lora.start=RUN begins a new training with the run's adapter"
    if trainer.get("load_best_model_at_end"):
        raise UserError(f"{where}: its weights are those of its best checkpoint, and that of its last step is gone; {advice}")
    if str(trainer.get("lr_scheduler_type")) in NEED_STATE:
        raise UserError(f"{where}: its schedule ({trainer['lr_scheduler_type']}) depends on what was measured, and no checkpoint of the last step has it; {advice}")
    if trainer.get("ema_decay"):
        raise UserError(f"{where}: saved the average of its weights (trainer.ema_decay), and no checkpoint of the last step has the weights themselves; {advice}")
    if changes_base(settings["lora"]):
        raise UserError(f"{where}: its adapter was rewritten after training (lora.init_lora_weights), and no checkpoint of the last step has it as trained; {advice}")
    if summary.get("sources"):
        raise UserError(f"{where}: no checkpoint of its last step has the counts of the sources of its mix; {advice}")
    trained_weights(parent, None)


def _copy_checkpoint(last: Path, home: Path) -> None:
    """The checkpoint of the last step, and the best one that it refers to, no longer marked as the end."""
    state = read_json(last / "trainer_state.json")
    best = Path(str(state.get("best_model_checkpoint") or last)).name
    for name in {last.name, best}:
        if (last.parent / name).is_dir():
            shutil.copytree(last.parent / name, home / name)
    _seal(home / last.name, {**checkpoints.read_state(last), "done": False})


def _make_checkpoint(parent: Run, folder: Path, settings: Settings, summary: Summary) -> None:
    """A checkpoint of the last step from the saved weights and logs: no optimizer state, no random state."""
    from transformers import TrainerState

    weights, _ = trained_weights(parent, None)
    shutil.copytree(weights, folder, ignore=shutil.ignore_patterns("README.md"))
    trainer = settings["trainer"]
    args, _ = training_settings(trainer, output_dir=os.devnull)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(parent / "metrics.jsonl")]
    last: dict[str, Any] = next((row for row in reversed(rows) if "train_loss" in row), {})
    steps = int(summary["steps"])
    state = TrainerState(
        epoch=float(last.get("epoch") or 0.0), global_step=steps, max_steps=steps, total_flos=float(last.get("total_flos") or 0.0),
        train_batch_size=trainer["per_device_train_batch_size"] * int(summary.get("micro_batches_folded") or 1),
        log_history=[row for row in rows if "train_loss" not in row],
    )  # fmt: skip
    state.compute_steps(args, steps)
    state.save_to_json(str(folder / "trainer_state.json"))
    meter: MeterState = {
        "loss": 0.0, "steps": 0, "logged_loss": float(last.get("train_loss") or 0.0) * steps, "supervised_tokens": int(summary.get("supervised_tokens") or 0),
        "skipped": int(summary.get("skipped_steps") or 0), "train_seconds": float(last.get("train_runtime") or 0.0), "sources": None, "rewards": [],
    }  # fmt: skip
    _seal(folder, {"format": checkpoints.FORMAT, "seconds": float(summary.get("seconds") or 0.0), "done": False, "files": {}, "meter": meter})


def _seal(folder: Path, state: checkpoints.CheckpointState) -> None:
    checkpoints.write_state(folder, state)
    checkpoints.seal(folder)


def _copy_logs(parent: Run, child: Run, checkpoint: Path, whole: bool) -> None:
    """The parent's logs up to its last step, whose sizes the checkpoint knows. whole: the checkpoint does not know them yet."""
    state = checkpoints.read_state(checkpoint)
    for name in ("metrics.jsonl", "eval/samples.jsonl"):
        if not (parent / name).is_file():
            continue
        lines = (parent / name).read_bytes()
        if whole:  # without the log that the Trainer writes at the end
            lines = b"".join(line for line in lines.splitlines(keepends=True) if b'"train_loss"' not in line)
            state["files"][name] = len(lines)
        (child / name).parent.mkdir(parents=True, exist_ok=True)
        (child / name).write_bytes(lines)
    if whole:
        _seal(checkpoint, state)
