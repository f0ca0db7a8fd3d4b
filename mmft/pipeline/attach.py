"""Stage 4: attach the adapter, freeze the rest, apply the rewrites of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapters.attach import attach_adapter
from ..adapters.convert import changes_base, initial_matrices
from ..adapters.freeze import freeze
from ..adapters.report import adapter_report
from ..common.records import PlanReport
from ..common.tensors import to_device
from ..config.settings import sharded_by
from ..models.quantization import prepare_for_training
from ..rewrites.apply import Rewrites, rewrite_for_training
from .context import RunContext
from .load import Base, cache_training_rows, use_feature_cache
from .preferences import Preferences, attached, prepare_preferences
from .prepare import TrainingInputs

if TYPE_CHECKING:
    import torch

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
    model = attach_adapter(model, inputs.plan, inputs.start.folder if inputs.start else None, bool(settings["trainer"].get("lora_fa")))
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
    report = adapter_report(model, inputs.plan, {row["part"]: row["rate"] for row in inputs.planned["rows"] if row["rate"] is not None})
    return Adapted(model, rewrites, {**report, "notes": inputs.planned["notes"]}, initial, preferences)


def _may_narrow(inputs: TrainingInputs) -> bool:
    """Whether the last layer may compute only what is read: not in full training, and not where the model is taken apart."""
    return not inputs.full and not inputs.rewards and inputs.family.rewrites == "auto" and sharded_by(inputs.settings["trainer"]) is None
