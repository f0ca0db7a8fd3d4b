"""Estimate the memory that one adapter of a joint group takes."""

from __future__ import annotations

from typing import Any

from ..adapters.plan import AdapterPlan

ADAM = 16  # bytes of a trained parameter: itself, its gradient, two moments, all fp32


def adapter_bytes(skeleton: Any, plan: AdapterPlan) -> int:
    """Bytes of one adapter during training, from the shapes of the layers it adapts; rank_pattern is ignored."""
    modules = dict(skeleton.named_modules())
    parameters = sum(plan.settings["r"] * (modules[name].in_features + modules[name].out_features) for name in plan.adapted)
    return parameters * ADAM
