"""Estimate the memory that one adapter of a joint group takes."""

from __future__ import annotations

from typing import Any

from ..adapters.parts import rank_and_alpha
from ..adapters.plan import AdapterPlan

ADAM = 16  # bytes of a trained parameter: itself, its gradient, two moments, all fp32


def adapter_bytes(skeleton: Any, plan: AdapterPlan) -> int:
    """Bytes of one adapter during training, from the shapes of the layers it adapts."""
    modules = dict(skeleton.named_modules())
    parameters = sum(rank_and_alpha(plan.settings, name)[0] * (modules[name].in_features + modules[name].out_features) for name in plan.adapted)
    return parameters * ADAM
