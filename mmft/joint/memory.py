"""How many adapters fit: in one group by what they keep for all of training, in one pass by what a pass keeps for its gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

ADAM = 16  # bytes a trained weight: itself, its gradient, two moments, all fp32
ROOM = 0.6  # of the free memory that a group may take; the rest is for what is made on the way


def adapter_bytes(skeleton: Any, plan: Any) -> int:
    """What one adapter takes, from the shapes of the layers it adapts; the rank of most of them stands for all."""
    modules = dict(skeleton.named_modules())
    weights = sum(plan.settings["r"] * (modules[name].in_features + modules[name].out_features) for name in plan.adapted)
    return weights * ADAM


def free_memory(device: str) -> int:
    """Bytes that may still be taken on the device a model is on."""
    import psutil
    import torch

    if device.startswith("cuda"):
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available


def fitting(one: Callable[[], Any], device: str, wanted: int) -> int:
    """How many members' rows go through one pass, by the bytes that `one()`, a single member's forward pass, keeps for its gradients.

    Counted as autograd keeps them, weights left out; at least 1.
    """
    import torch

    if wanted == 1:
        return 1
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.device.type == torch.device(device).type:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        answer = one()
    del answer
    # the largest gradient of an activation lives beside them
    return max(1, min(wanted, int(ROOM * free_memory(device) / (sum(kept.values()) + max(kept.values(), default=0) + 1))))
