"""How many adapters fit into one group, by what each keeps for all of training."""

from __future__ import annotations

from typing import Any

ADAM = 16  # bytes a trained weight: itself, its gradient, two moments, all fp32


def adapter_bytes(skeleton: Any, plan: Any) -> int:
    """What one adapter takes, from the shapes of the layers it adapts; the rank of most of them stands for all."""
    modules = dict(skeleton.named_modules())
    weights = sum(plan.settings["r"] * (modules[name].in_features + modules[name].out_features) for name in plan.adapted)
    return weights * ADAM
