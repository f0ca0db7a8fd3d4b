"""Compute the bytes that a run and its checkpoints need, and refuse to start or save if the disk lacks them."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters.experts import adapter_size
from ..adapters.methods import METHODS, added_parameters
from ..adapters.parts import rank_and_alpha
from ..adapters.plan import AdapterPlan
from ..common.errors import UserError
from ..config.settings import Section, Settings
from ..system.disk import existing_parent, folder_size, megabytes
from ..system.distributed import world_size

if TYPE_CHECKING:
    import torch

STATE_BYTES = {"adamw": 8, "adam": 8, "8bit": 2, "sgd": 0, "adafactor": 1, "lion": 4}  # optimizer state for each trained parameter
PARAMETER = 4  # bytes of a trained parameter: adapters and fully trained models are fp32
SMALL_FILES = 128 << 10  # of a checkpoint: schedule, random state, counts
REPORT = 32 << 20  # report, its pictures, the loss curve, the logger's files
ANSWER = 4 << 10  # of one held-out row in eval/, base and tuned together


@dataclass
class DiskNeed:
    """Bytes by purpose."""

    parts: dict[str, int]

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return ", ".join(f"{what} {megabytes(n)}" for what, n in self.parts.items())


def optimizer_bytes(name: str) -> int:
    """Bytes of optimizer state for each trained parameter, by the optimizer's name in TrainingArguments.optim."""
    name = str(name).split(".")[-1].lower()
    if "8bit" in name:
        return STATE_BYTES["8bit"]
    return next((b for key, b in STATE_BYTES.items() if name.startswith(key)), 8)


def disk_need(skeleton: torch.nn.Module, plan: AdapterPlan, settings: Settings, folder: Path, n_rows: int, n_held_out: int) -> DiskNeed:
    """What a run will write: weights, checkpoints with optimizer state, answers, report.

    skeleton: the model without weights. folder: the model's files, whose tokenizer and processor are saved with each checkpoint.
    n_rows: training rows.
    """
    trained, saved = parameter_counts(skeleton, plan)
    weights = (".safetensors", ".bin", ".gguf", ".pt", ".py")
    processor = sum(f.stat().st_size for f in Path(folder).iterdir() if f.is_file() and f.suffix not in weights)
    checkpoint = PARAMETER * saved + optimizer_bytes(settings["trainer"].get("optim") or "adamw") * trained + processor + SMALL_FILES
    n = checkpoint_count(settings["trainer"], n_rows)
    return DiskNeed({
        "adapter" if plan.method == "lora" else "model": PARAMETER * saved + processor,
        f"{n} checkpoint{'s' * (n > 1)} with optimizer state": n * checkpoint,
        "answers and report": REPORT + ANSWER * n_held_out,
    })  # fmt: skip


def parameter_counts(skeleton: Any, plan: AdapterPlan) -> tuple[int, int]:
    """(number of trained parameters, number of saved ones)."""
    parameters = dict(skeleton.named_parameters())
    if plan.method == "full":
        return sum(p.numel() for name, p in parameters.items() if plan.trains(name)), sum(p.numel() for p in parameters.values())
    modules, rank = dict(skeleton.named_modules()), max([plan.settings["r"], *(plan.settings.get("rank_pattern") or {}).values()])
    if plan.is_lora:
        n = sum(rank_and_alpha(plan.settings, name)[0] * sum(modules[name].weight.shape) for name in plan.adapted)
    else:
        n = sum(added_parameters(METHODS[plan.adapter], plan.settings, plan.options, {name: modules[name] for name in plan.adapted}).values())
    n += sum(adapter_size(parameters[name].shape, rank) for name in plan.parameters)
    for saved in plan.settings.get("modules_to_save") or []:
        n += sum(p.numel() for name, p in parameters.items() if f".{saved}." in f".{name}")
    return n, n


def checkpoint_count(trainer: Section, n_rows: int) -> int:
    """The largest number of checkpoints on the disk at once: the newest is written before the oldest is removed.

    At least one, because a signal saves a checkpoint even if none is asked for.
    """
    batch = trainer["per_device_train_batch_size"] * (trainer.get("gradient_accumulation_steps") or 1) * world_size()
    steps_per_epoch, steps = max(1, n_rows // batch), trainer.get("max_steps") or -1
    steps = steps if steps > 0 else math.ceil((trainer.get("num_train_epochs") or 3) * steps_per_epoch)
    strategy, every, limit = str(trainer.get("save_strategy")), float(trainer.get("save_steps") or 500), trainer.get("save_total_limit")
    every = every if every >= 1 else max(1.0, every * steps)
    saves = {"steps": int(steps // every), "epoch": math.ceil(steps / steps_per_epoch), "best": 2}.get(strategy, 0) + 1
    kept = max(limit, 1 + bool(trainer.get("load_best_model_at_end"))) if limit and limit > 0 else saves
    return min(saves, kept + 1)


def check_disk(place: Path, need: DiskNeed, runs: int = 1, present: int = 0) -> None:
    """Raises UserError if the disk lacks the bytes. runs: that start together. present: bytes this run has on the disk already."""
    free, wanted = shutil.disk_usage(existing_parent(place)).free, need.bytes * runs - present
    if free < wanted:
        each = f" for each of {runs} runs" if runs > 1 else ""
        raise UserError(
            f"{place}: {megabytes(free)} free, and {megabytes(wanted)} will be needed ({need}{each}): free some, keep fewer checkpoints"
            " (trainer.save_total_limit), or write elsewhere (output_dir=...)"
        )


def checkpoint_bytes(model: torch.nn.Module, optimizer: Any, newest: Path | None) -> int:
    """Bytes of the next checkpoint: the saved weights and the optimizer's state, and not less than the newest checkpoint has."""
    import torch

    saved = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not hasattr(model, "peft_config"))
    states = getattr(optimizer, "state", None) or {}
    kept = sum(t.numel() * t.element_size() for state in states.values() if isinstance(state, dict) for t in state.values() if isinstance(t, torch.Tensor))
    return max(saved + kept + 4 * SMALL_FILES, int(1.05 * folder_size(newest)) if newest else 0)
