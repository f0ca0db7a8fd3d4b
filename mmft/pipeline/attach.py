"""Stage 4: attach the adapter, freeze the rest, apply the rewrites of training."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapters.attach import attach_adapter
from ..adapters.convert import changes_base, initial_matrices
from ..adapters.freeze import freeze
from ..adapters.report import adapter_report
from ..adapters.starts import StartSources, start_of
from ..common.errors import UserError
from ..common.records import PlanReport
from ..common.tensors import to_device
from ..config.settings import sharded_by
from ..models.load import load_model
from ..models.quantization import prepare_for_training
from ..rewrites.apply import Rewrites, rewrite_for_training
from ..training.compiled import compile_layers, wanted_compile
from ..training.sampling import epoch_order
from .context import RunContext
from .load import Base, cache_training_rows, use_feature_cache
from .preferences import Preferences, attached, prepare_preferences
from .prepare import TrainingInputs

if TYPE_CHECKING:
    import torch

log = logging.getLogger("mmft")

NUMERIC_KEYS = ("r", "lora_alpha", "lora_dropout")  # keys of an adapter that change numbers, not what is computed


@dataclass
class Adapted:
    """The model that is trained: with its adapter, frozen, with its rewrites.

    initial: the adapter's first matrices, if their initialisation changed the base weights. preferences: of a preference objective.
    """

    model: Any
    rewrites: Rewrites
    report: PlanReport
    initial: dict[str, torch.Tensor] | None = None
    preferences: Preferences | None = None


def attach(inputs: TrainingInputs, base: Base, context: RunContext, run_bytes: int = 0) -> Adapted:
    """Make the base model trainable. A quantised base gets its feature cache here, after its preparation for training."""
    from transformers import set_seed

    settings, model = inputs.settings, base.loaded.model
    set_seed(settings["seed"])
    model = prepare_for_training(model, base.loaded.quantization, settings["trainer"], inputs.family.path)
    # the reference of a preference objective is the model as it is now: the base, or with lora.start the adapter that goes on
    preferences = None if inputs.start else prepare_preferences(inputs, base, context, model)
    sources = start_sources(inputs, base, model) if start_of(inputs.plan.settings) else None
    if sources is not None:
        set_seed(settings["seed"])  # whatever a preference objective has drawn before
    model = attach_adapter(model, inputs.plan, inputs.start.folder if inputs.start else None, bool(settings["trainer"].get("lora_fa")), sources)
    if inputs.start:
        preferences = prepare_preferences(inputs, base, context, model)
    elif preferences is not None:
        attached(inputs, preferences, model)
    rewrites = rewrite_for_training(model, inputs.family.rewrites, settings["seed"])
    freeze(model, noisy_embeddings=bool(settings["trainer"].get("neftune_noise_alpha")))
    initial = initial_matrices(model) if changes_base(inputs.plan.settings) else None
    if base.loaded.quantized and not inputs.rewards:  # the preparation casts some weights, so features are computed after it
        use_feature_cache(inputs, base, context, run_bytes)
        if preferences is not None:
            preferences.collator.collator = base.collator
    if base.by_row:
        rewrites.attend_by_row(model)
    cache_training_rows(inputs, base, model)
    if _may_narrow(inputs):
        batch = to_device(base.collator([base.rows[0]]), model.device)
        adapter = {k: v for k, v in settings["lora"].items() if k not in NUMERIC_KEYS}
        rewrites.narrow(model, batch, lambda compare: context.memo.once(inputs.base_key("last layer", adapter), compare))
    if (wanted := wanted_compile(settings["trainer"])) is not None:
        log.info("%-14s %d layers are compiled by %s for training; the first steps wait for it", "compile", compile_layers(model, rewrites.replaced, wanted), wanted.backend)
    report = adapter_report(model, inputs.plan, {row["part"]: row["rate"] for row in inputs.planned["rows"] if row["rate"] is not None})
    return Adapted(model, rewrites, {**report, "notes": inputs.planned["notes"]}, initial, preferences)


def start_sources(inputs: TrainingInputs, base: Base, model: Any) -> StartSources:
    """What an initialisation from data begins with: batches of the training's size, of rows that the seed draws; the base's own unquantised weights."""
    settings = inputs.settings
    size = settings["trainer"]["per_device_train_batch_size"]

    def batches(single: bool) -> list[dict[str, Any]]:
        order = epoch_order(len(base.rows), base.mixing, settings["seed"], 0)[: inputs.plan.init_batches * size]
        step = 1 if single else size
        taken = [base.rows[i] for i in order]
        return [to_device(base.collator(taken[i : i + step]), model.device) for i in range(0, len(taken), step)]

    def original() -> dict[str, torch.Tensor]:
        if not base.loaded.quantized:
            raise UserError("lora.init_lora_weights=loftq: this machine could not quantise the base (see above), so nothing is to be corrected; use true or pissa")
        whole = load_model(dataclasses.replace(inputs.family, quantization=None), located=inputs.located).model
        return {name: whole.get_submodule(name).weight for name in inputs.plan.adapted}

    return StartSources(batches, original)


def _may_narrow(inputs: TrainingInputs) -> bool:
    """Whether the last layer may compute only what is read: not in full training, and not where the model is taken apart."""
    return not inputs.full and not inputs.rewards and inputs.family.rewrites == "auto" and sharded_by(inputs.settings["trainer"]) is None
