"""The bytes a run will leave on the disk, counted before it starts and before each save, and what is said when they are not there."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.errors import UserError
from ..system.disk import existing_parent, folder_size, megabytes

STATES = {"adamw": 8, "adam": 8, "8bit": 2, "sgd": 0, "adafactor": 1, "lion": 4}  # bytes an optimizer keeps for a trained weight
WEIGHT = 4  # bytes of a trained weight: adapters are fp32, and so is a model that is trained whole
SMALL = 128 << 10  # of a checkpoint: schedule, random numbers, states
REPORT = 32 << 20  # report, its pictures, the curve, the logger's files
ANSWER = 4 << 10  # of one held-out row in eval/, base and tuned together


@dataclass
class Need:
    """Bytes by what they are for."""

    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return ", ".join(f"{what} {megabytes(n)}" for what, n in self.parts.items())


def optimizer_bytes(name: str) -> int:
    """Bytes of optimizer state a trained weight needs, by the name TrainingArguments.optim has for it."""
    name = str(name).split(".")[-1].lower()
    if "8bit" in name:
        return STATES["8bit"]
    return next((b for key, b in STATES.items() if name.startswith(key)), 8)


def needed(skeleton: Any, plan: Any, settings: dict[str, Any], folder: Path, n_rows: int, n_held_out: int) -> Need:
    """What a run will write: weights, checkpoints with optimizer state, answers and report. No weights are needed.

    folder: the model's files, whose tokenizer and processor are saved with each checkpoint. n_rows: training rows.
    """
    trained, saved = weights(skeleton, plan)
    beside = sum(f.stat().st_size for f in Path(folder).iterdir() if f.is_file() and f.suffix not in (".safetensors", ".bin", ".gguf", ".pt", ".py"))
    checkpoint = WEIGHT * saved + optimizer_bytes(settings["trainer"].get("optim") or "adamw") * trained + beside + SMALL
    n = checkpoints(settings["trainer"], n_rows)
    return Need({
        "adapter" if plan.method == "lora" else "model": WEIGHT * saved + beside,
        f"{n} checkpoint{'s' * (n > 1)} with optimizer state": n * checkpoint,
        "answers and report": REPORT + ANSWER * n_held_out,
    })  # fmt: skip


def weights(skeleton: Any, plan: Any) -> tuple[int, int]:
    """(how many weights are trained, how many are saved)."""
    from ..adapters.lora import SCOPES
    from ..common.model_parts import part_of

    everything = dict(skeleton.named_parameters())
    if plan.method == "full":
        return sum(p.numel() for name, p in everything.items() if part_of(name) in SCOPES[plan.scope]), sum(p.numel() for p in everything.values())
    modules, ranks = dict(skeleton.named_modules()), max([plan.settings["r"], *(plan.settings.get("rank_pattern") or {}).values()])
    n = sum(ranks * (modules[name].in_features + modules[name].out_features) for name in plan.adapted)
    for whole in plan.settings.get("modules_to_save") or []:
        n += sum(p.numel() for name, p in everything.items() if f".{whole}." in f".{name}")
    return n, n


def checkpoints(trainer: dict[str, Any], n_rows: int) -> int:
    """How many lie on the disk at most; the newest is there before the oldest goes. One where none is asked for: a signal saves."""
    from ..system.distributed import world_size

    batch = trainer["per_device_train_batch_size"] * (trainer.get("gradient_accumulation_steps") or 1) * world_size()
    an_epoch, steps = max(1, n_rows // batch), trainer.get("max_steps") or -1
    steps = steps if steps > 0 else math.ceil((trainer.get("num_train_epochs") or 3) * an_epoch)
    kind, every, limit = str(trainer.get("save_strategy")), float(trainer.get("save_steps") or 500), trainer.get("save_total_limit")
    every = every if every >= 1 else max(1.0, every * steps)
    saves = {"steps": int(steps // every), "epoch": math.ceil(steps / an_epoch), "best": 2}.get(kind, 0) + 1
    kept = max(limit, 1 + bool(trainer.get("load_best_model_at_end"))) if limit and limit > 0 else saves
    return min(saves, kept + 1)


def check(place: Path, need: Need, times: int = 1, there: int = 0) -> None:
    """times: runs that start together. there: bytes this run has on the disk. Errors raised: UserError when the disk lacks them."""
    free, wanted = shutil.disk_usage(existing_parent(place)).free, need.bytes * times - there
    if free < wanted:
        each = f" for each of {times} runs" if times > 1 else ""
        raise UserError(
            f"{place}: {megabytes(free)} free, and {megabytes(wanted)} will be needed ({need}{each}): free some, keep fewer checkpoints"
            " (trainer.save_total_limit), or write elsewhere (output_dir=...)"
        )


def checkpoint_bytes(trainer: Any, newest: Path | None) -> int:
    """Bytes of the next checkpoint: the weights it saves, the optimizer's state as it is, and no less than the newest one has."""
    import torch

    bytes_on_disk = trainer.model.parameters()
    saved = sum(p.numel() * p.element_size() for p in bytes_on_disk if p.requires_grad or not hasattr(trainer.model, "peft_config"))
    states = getattr(trainer.optimizer, "state", None) or {}
    kept = sum(t.numel() * t.element_size() for state in states.values() if isinstance(state, dict) for t in state.values() if isinstance(t, torch.Tensor))
    return max(saved + kept + 4 * SMALL, int(1.05 * folder_size(newest)) if newest else 0)
