"""The table of what is trained, by part of the model, and its expert tensors (a run's lora_plan.json)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from ..common.model_parts import PARTS, part_of, size
from ..common.records import ExpertRow, PlanReport, PlanRow
from .experts import adapter_size, expert_tensors
from .methods import METHODS, added_parameters
from .parts import rank_and_alpha
from .plan import AdapterPlan

if TYPE_CHECKING:
    import torch


def adapter_report(model: torch.nn.Module, plan: AdapterPlan, rates: Mapping[str, float] | None = None) -> PlanReport:
    """Modules, rank, scale, rate and parameter counts of each part that the model has.

    rates: learning rate of each part.
    """
    from peft.tuners.lora import LoraLayer

    ranks, scales = _planned_ranks(plan) if not plan.is_lora else ({}, {})
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            ranks.setdefault(part_of(name), set()).update(module.r.values())
            scales.setdefault(part_of(name), set()).update(module.scaling.values())
    sizes = [(part_of(n), p.requires_grad, size(p)) for n, p in model.named_parameters() if ".original_module." not in n]
    totals = {part: (sum(n for p, t, n in sizes if p == part and t), sum(n for p, _, n in sizes if p == part)) for part, *_ in sizes}
    return _report(model, plan, ranks, scales, totals, rates or {})


def planned_report(skeleton: torch.nn.Module, plan: AdapterPlan, rates: Mapping[str, float] | None = None, fixed_a: bool = False) -> PlanReport:
    """The same from a model without weights, before anything is attached to it. fixed_a: the matrices A are not trained (LoRA-FA)."""
    parameters, modules = dict(skeleton.named_parameters()), dict(skeleton.named_modules())
    settings = plan.settings
    ranks, scales = _planned_ranks(plan)
    added, trained = Counter[str](), Counter[str]()
    saved = [n for n in modules if any(n == w or n.endswith(f".{w}") for w in settings.get("modules_to_save") or ())]
    for name, parameter in parameters.items():
        biases = settings.get("bias") == "all" and "bias" in name or settings.get("bias") == "lora_only" and name.removesuffix(".bias") in plan.adapted
        beside = biases or any(name.startswith(f"{module}.") for module in saved)
        trained[part_of(name)] += parameter.numel() * (plan.trains(name) if plan.method == "full" else beside)
    if plan.method == "lora" and not plan.is_lora:
        for name, own in added_parameters(METHODS[plan.adapter], settings, plan.options, {n: modules[n] for n in plan.adapted}).items():
            added[plan.adapted[name]] += own
            trained[plan.adapted[name]] += own
    for name, part in (plan.adapted | plan.parameters).items() if plan.is_lora else ():
        rank, _ = rank_and_alpha(settings, name)
        shape = tuple(parameters[name].shape) if name in plan.parameters else tuple(cast(Any, modules[name]).weight.shape)
        a = rank * shape[0] * shape[1] if name in plan.parameters else rank * shape[1]
        own = adapter_size(shape, rank) if name in plan.parameters else rank * (shape[0] + shape[1])
        own += shape[0] * (bool(settings.get("use_dora")) + bool(settings.get("lora_bias")))
        added[part] += own
        trained[part] += own - a * fixed_a
    tokens = settings.get("trainable_token_indices") or {}
    if not isinstance(tokens, Mapping):  # a list is of the table that reads the tokens
        table = next(n for n, m in modules.items() if m is skeleton.get_input_embeddings())
        tokens = {table: tokens}
    for table, rows in tokens.items():
        name = next(n for n in modules if n == table or n.endswith(f".{table}"))
        added[part_of(name)] += len(rows) * cast(Any, modules[name]).weight.shape[1]
        trained[part_of(name)] += len(rows) * cast(Any, modules[name]).weight.shape[1]
    whole = Counter[str]()
    for name, parameter in parameters.items():
        whole[part_of(name)] += parameter.numel()
    totals = {part: (trained[part], n + added[part]) for part, n in whole.items()}
    return _report(skeleton, plan, ranks, scales, totals, rates or {})


def _planned_ranks(plan: AdapterPlan) -> tuple[dict[str, set[int]], dict[str, set[float]]]:
    """(ranks, effective scales) by part; empty for methods that have none."""
    ranks: dict[str, set[int]] = {}
    scales: dict[str, set[float]] = {}
    keys = METHODS[plan.adapter].keys
    for name, part in (plan.adapted | plan.parameters).items():
        rank, alpha = rank_and_alpha(plan.settings, name)
        if plan.is_lora or "r" in keys:
            ranks.setdefault(part, set()).add(rank)
        if plan.is_lora or "lora_alpha" in keys:
            scales.setdefault(part, set()).add(alpha / (math.sqrt(rank) if plan.settings.get("use_rslora") else rank))
    return ranks, scales


def _report(
    model: torch.nn.Module, plan: AdapterPlan, ranks: Mapping[str, set[int]], scales: Mapping[str, set[float]], totals: Mapping[str, tuple[int, int]],
    rates: Mapping[str, float],
) -> PlanReport:  # fmt: skip
    """totals: part -> (trained, all) parameters."""
    rows: list[PlanRow] = [
        {
            "part": part,
            "method": _method(plan, part, totals[part][0]),
            "modules": sum(p == part for p in plan.adapted.values()),
            "linear": plan.linear.get(part, 0),
            "r": ", ".join(map(str, sorted(ranks.get(part, ())))),
            "scale": max(scales[part]) if scales.get(part) else None,
            "rate": rates.get(part) if totals[part][0] else None,
            "trainable": totals[part][0],
            "total": totals[part][1],
        }
        for part in PARTS if part in totals
    ]  # fmt: skip
    return {
        "method": plan.method,
        **({"adapter": METHODS[plan.adapter].title} if plan.method == "lora" else {}),
        "scope": plan.scope,
        "rows": rows,
        "experts": _expert_rows(model, plan),
        "unreachable": plan.unreachable,
        "trainable_parameters": sum(r["trainable"] for r in rows),
        "total_parameters": sum(r["total"] for r in rows),
        "modules_to_save": list(plan.settings.get("modules_to_save") or []),
    }


def _method(plan: AdapterPlan, part: str, trained: int) -> str:
    if not trained:
        return "frozen"
    if plan.method == "full":
        return "full" if plan.top_layers is None else f"top {plan.top_layers} layers"
    title = "DoRA" if plan.settings.get("use_dora") else METHODS[plan.adapter].title
    adapter = title if part in {*plan.adapted.values(), *plan.parameters.values()} else ""
    saved = "whole" if part in plan.whole.values() or any(part_of(name) == part for name in plan.settings.get("modules_to_save") or ()) else ""
    return " + ".join(filter(None, (adapter, saved))) or "some"


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
