"""Attach the adapter of a plan to a model, or mark the weights that full training updates."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError
from ..common.private_api import names_taken_for_experts
from ..config.key_types import arguments
from ..config.library_keys import lora_config
from ..system.memory import is_out_of_memory
from .methods import METHODS, peft_config
from .parts import target_pattern
from .plan import AdapterPlan
from .starts import EVA, SETTINGS, StartSources, after_peft, before_peft, peft_values, start_of
from .stored import fill

if TYPE_CHECKING:
    import torch

log = logging.getLogger("mmft")


def attach_adapter(model: torch.nn.Module, plan: AdapterPlan, start: Path | None = None, fixed_a: bool = False, sources: StartSources | None = None) -> Any:
    """The model with a new adapter (a PeftModel), or the model itself with the weights of `scope` trainable.

    start: the folder of the adapter whose weights it begins with. fixed_a: its matrices A are not trained (LoRA-FA). sources: what initialisations from data
    begin with; without it they are left out, and counts are the same. Trained weights are fp32, whatever the base is in. Raises UserError if peft refuses the
    settings or adapts other modules than planned. EVA may leave out layers, which are taken out of the plan.
    """
    if plan.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(plan.trains(name))
        return model
    from peft import get_peft_model

    try:
        with warnings.catch_warnings():
            if not plan.is_lora or start_of(plan.settings):  # the plan's notes say what peft warns of
                warnings.simplefilter("ignore")
            config = adapter_config(model, plan, sources is not None)
            if sources is not None:
                before_peft(model, config, plan.settings, sources, list(plan.adapted))
            peft_model = get_peft_model(model, config)
        if sources is not None:
            after_peft(peft_model, plan.settings, sources)
    except (ValueError, TypeError, ImportError, NotImplementedError, KeyError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        why = f"it misses the key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise UserError(f"lora: peft refuses these settings: {why}") from None
    adapted = adapted_names(peft_model)
    if sources is not None and start_of(plan.settings) == EVA:
        leave_out(plan, set(plan.adapted) - adapted)
    planned = {*plan.adapted, *plan.parameters}
    if adapted != planned:
        odd = sorted(adapted ^ planned)
        raise UserError(f"lora: peft adapted {len(adapted)} modules where {len(planned)} were planned, e.g. {odd[0]}")
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # half-precision copies (modules_to_save) would lose small steps
    run_saved_modules_in_float(peft_model)
    if start is not None:
        fill(peft_model, start)
    if fixed_a:
        for name, parameter in peft_model.named_parameters():
            if ".lora_A." in name or "lora_embedding_A" in name:
                parameter.requires_grad_(False)
    return peft_model


def leave_out(plan: AdapterPlan, names: set[str]) -> None:
    """Take layers that EVA gave no rank out of the plan, and say so."""
    for name in names:
        del plan.adapted[name]
    if names:
        log.info("%-14s EVA gives %d of %d layers no rank, e.g. %s", "adapter", len(names), len(names) + len(plan.adapted), min(names))


def adapter_config(model: torch.nn.Module, plan: AdapterPlan, with_start: bool = False) -> Any:
    """peft's config object of a plan's adapter. with_start: for an initialisation from data. Raises what peft raises for values that it does not take."""
    from peft import LoraConfig

    pattern = target_pattern(plan.adapted)
    matched = {n for n, _ in model.named_modules() if re.fullmatch(pattern, n)}
    # the plan has already applied layers_to_transform and exclude_modules; a list of full names says exactly the same
    anchored = plan.adapted and matched == set(plan.adapted) and not names_taken_for_experts(str(getattr(model.config, "model_type", "")))
    targets = pattern if anchored else sorted(plan.adapted)
    if not plan.is_lora:
        return peft_config(METHODS[plan.adapter], plan.settings, plan.options, targets, plan.adapted)
    settings = arguments({k: v for k, v in plan.settings.items() if v is not None}, lora_config()) | {"target_modules": targets}
    for key in SETTINGS:  # mappings of plain values; peft wants its own objects
        settings.pop(key, None)
    if start_of(plan.settings):
        settings |= peft_values(plan.settings) if with_start else {"init_lora_weights": True}
    if plan.parameters:  # full names: the names in the settings may also match outside the scope
        settings["target_parameters"] = sorted(plan.parameters)
    for applied in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        settings.pop(applied, None)
    return LoraConfig(**settings)


def adapted_names(peft_model: torch.nn.Module) -> set[str]:
    """The names of the modules that have an adapter, and of the parameters that have one of their own, as the base model names them."""
    from peft.tuners.lora.layer import ParamWrapper

    names = set()
    kind = adapted_layer_class(peft_model)
    for name, module in peft_model.named_modules():
        if isinstance(module, kind):
            name = name.removeprefix("base_model.model.")
            # wrappers of two parameters of one module lie inside each other
            names.add(f"{name.replace('.base_layer', '')}.{module.parameter_name}" if isinstance(module, ParamWrapper) else name)
    return names


def adapted_layer_class(peft_model: Any) -> type:
    """The class of the adapted layers of a PeftModel: LoraLayer, IA3Layer, ..."""
    kind: type = peft_model.base_model.tuner_layer_cls
    return kind


def run_saved_modules_in_float(model: torch.nn.Module) -> list[Any]:
    """Make modules_to_save compute in fp32 inside a half-precision base, also without autocast.

    Training runs under autocast, but evaluation and later verbs do not: without these casts an fp32 projector fails on bf16 inputs.
    Returns the hooks that cast.
    """
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    def cast(value: Any, dtype: torch.dtype) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    def cast_inputs(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(cast(a, torch.float32) for a in args)

    def cast_output(module: torch.nn.Module, args: tuple[Any, ...], output: Any, dtype: torch.dtype) -> Any:
        return cast(output, dtype)

    hooks: list[Any] = []
    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        base_dtype = next((p.dtype for p in wrapper.original_module.parameters()), torch.float32)
        if base_dtype not in (torch.float16, torch.bfloat16):
            continue
        for module in wrapper.modules_to_save.values():
            module.float()
            hooks.append(module.register_forward_pre_hook(cast_inputs))
            hooks.append(module.register_forward_hook(lambda module, args, output, dtype=base_dtype: cast_output(module, args, output, dtype)))
    return hooks
