"""The table of what is trained, by part of the model, and its expert tensors (a run's lora_plan.json)."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from ..common.model_parts import PARTS, part_of, size
from ..common.records import ExpertRow, PlanReport, PlanRow
from .experts import expert_tensors
from .plan import AdapterPlan

if TYPE_CHECKING:
    import torch


def adapter_report(model: torch.nn.Module, plan: AdapterPlan) -> PlanReport:
    """Modules, rank, scale and parameter counts of each part that the model has."""
    from peft.tuners.lora import LoraLayer

    ranks: dict[str, set[int]] = {}
    scales: dict[str, set[float]] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            ranks.setdefault(part_of(name), set()).update(module.r.values())
            scales.setdefault(part_of(name), set()).update(module.scaling.values())
    rows: list[PlanRow] = []
    for part in PARTS:
        sizes = [(p.requires_grad, size(p)) for n, p in model.named_parameters() if part_of(n) == part and ".original_module." not in n]
        if not sizes:
            continue
        part_scales = sorted(scales.get(part, ()))
        rows.append(
            {
                "part": part,
                "modules": sum(p == part for p in plan.adapted.values()),
                "linear": plan.linear.get(part, 0),
                "r": ", ".join(map(str, sorted(ranks.get(part, ())))),
                "scale": part_scales[-1] if part_scales else None,
                "trainable": sum(n for trained, n in sizes if trained),
                "total": sum(n for _, n in sizes),
            }
        )
    return {
        "method": plan.method,
        "scope": plan.scope,
        "rows": rows,
        "experts": _expert_rows(model, plan),
        "unreachable": plan.unreachable,
        "trainable_parameters": sum(r["trainable"] for r in rows),
        "total_parameters": sum(r["total"] for r in rows),
        "modules_to_save": list(plan.settings.get("modules_to_save") or []),
    }


def _expert_rows(model: torch.nn.Module, plan: AdapterPlan) -> list[ExpertRow]:
    """One row for the expert tensors of each name and shape, whether they are adapted or not."""
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for wrapped, shape in expert_tensors(model).items():
        name = wrapped.removeprefix("base_model.model.").replace(".base_layer", "")
        groups.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), shape), []).append(name)
    return [
        {"name": name, "part": part_of(name), "shape": list(shape), "tensors": len(names), "adapted": sum(n in plan.parameters for n in names),
         "total": len(names) * math.prod(shape)}
        for (name, shape), names in groups.items()
    ]  # fmt: skip
