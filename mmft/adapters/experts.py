"""Expert tensors of mixtures of experts: 3-D parameters that no linear layer holds, which `lora.target_parameters` adapts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..common.model_parts import part_of
from ..common.private_api import names_taken_for_experts

if TYPE_CHECKING:
    import torch

# Names of layers that choose experts, or weigh a shared one. They stay as they are unless lora.target_modules names them.
ROUTERS = ("gate", "router", "shared_expert_gate")
INDEXERS = ("indexer",)  # modules that choose the tokens of sparse attention; no gradient passes through that choice


def expert_tensors(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """name -> shape (experts, ., .) of each expert tensor; convolutions, which have three dimensions too, are left out."""
    import torch

    convolutions = {id(p) for m in model.modules() if isinstance(m, (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)) for p in m.parameters(recurse=False)}
    named = ((n, p) for n, p in model.named_parameters() if p.dim() == 3 and "expert" in n and id(p) not in convolutions)
    return {name: tuple(p.shape) for name, p in named}


def choosing_layers(model: torch.nn.Module) -> set[str]:
    """The modules that choose experts or tokens, or weigh a shared expert; in most models routers are no linear layers."""
    names = {n for n, _ in model.named_modules()}
    gates = {n for n in names if n.split(".")[-1] in ROUTERS}
    return {n for n in names if not set(INDEXERS).isdisjoint(n.split("."))} | (gates if gates and expert_tensors(model) else set())


def unreachable_layers(model: torch.nn.Module, names: Iterable[str]) -> set[str]:
    """Those of `names` (linear layers) that peft cannot adapt in this model, because it takes their names for those of experts."""
    taken = names_taken_for_experts(str(getattr(getattr(model, "config", None), "model_type", "")))
    return {n for n in names if n.split(".")[-1] in taken}


def planned_parameters(skeleton: torch.nn.Module, settings: Mapping[str, Any], parts: set[str], scope: str) -> dict[str, str]:
    """name -> part of the parameters that `target_parameters` adapts: those whose name ends with one of its entries, inside the scope.

    Raises UserError for an entry that names no parameter, one of a linear layer, or one outside the scope, and for dropout.
    """
    wanted = settings.get("target_parameters") or []
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    chosen: dict[str, str] = {}
    for entry in wanted:
        found = [n for n in shapes if n == entry or n.endswith(f".{entry}")]  # peft's own rule
        if not found:
            raise UserError(f"lora.target_parameters: no parameter's name ends with {entry}.{_hint(entry, expert_tensors(skeleton))}")
        flat = [n for n in found if len(shapes[n]) != 3]
        if flat:
            raise UserError(f"lora.target_parameters: {flat[0]} is no expert tensor (experts, in, out) but {shapes[flat[0]]}; lora.target_modules adapts linear layers")
        inside = {n: part_of(n) for n in found if part_of(n) in parts}
        if not inside:
            raise UserError(f"lora.target_parameters: {entry} lies only in the {part_of(found[0])} part, outside lora.scope={scope}; use lora.scope=all or drop it")
        chosen |= inside
    if chosen and settings.get("lora_dropout"):
        raise UserError("lora.target_parameters: peft has no dropout in front of expert tensors; set lora.lora_dropout=0")
    return chosen


def adapter_size(shape: Sequence[int], rank: int) -> int:
    """Number of weights of an adapter over an expert tensor (experts, ., .): two matrices for each expert."""
    return rank * shape[0] * (shape[1] + shape[2])


def _hint(entry: str, tensors: Mapping[str, object]) -> str:
    if not tensors:
        return " This model has no expert tensors."
    names = sorted({".".join(n.split(".")[-2:]) for n in tensors})
    return nearest(entry, names) or f" There are: {', '.join(names)}."
