"""LoRA as plan, attach, report: what will be adapted is decided and checked on a model without weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ..common.errors import UserError, nearest
from ..common.model_parts import PARTS, part_of, size
from ..config.library_keys import lora_config
from ..config.validate import arguments

SCOPES = {"language": {"language"}, "vision": {"vision"}, "connector": {"connector"}, "all": set(PARTS)}


@dataclass
class Plan:
    """What will be trained. `settings` are LoraConfig's keys as given; `adapted` maps module name -> part."""

    method: str  # "lora" or "full"
    scope: str
    settings: dict[str, Any]
    adapted: dict[str, str] = field(default_factory=dict)
    linear: dict[str, int] = field(default_factory=dict)  # part -> number of linear layers there are


def plan(skeleton: Any, settings: dict[str, Any]) -> Plan:
    """Decide on a model (weights not needed) which modules get an adapter. Errors raised: UserError.

    A list of names is anchored to `scope`: LLaVA's q_proj is then the language model's and not CLIP's. A name that lies
    nowhere, or only outside the scope, is an error; so is a regular expression that reaches outside it.
    """
    import torch

    settings = {k: v for k, v in settings.items() if k != "scope"} | {"scope": settings.get("scope", "language")}
    scope = settings.pop("scope")
    if scope not in SCOPES:
        raise UserError(f"lora.scope={scope}: no such scope.{nearest(str(scope), SCOPES)} There are: {', '.join(SCOPES)}.")
    layers = {n: part_of(n) for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    linear = {part: sum(p == part for p in layers.values()) for part in PARTS}
    if settings.get("r") is None:
        extra = sorted(k for k, v in settings.items() if v is not None)
        if extra:
            raise UserError(f"lora.{extra[0]}: without lora.r the whole model is trained, and this key has no effect; set lora.r or drop it")
        return Plan("full", scope, {}, {}, linear)
    if not isinstance(settings["r"], int) or settings["r"] < 1:
        raise UserError(f"lora.r={settings['r']}: must be a whole number above 0 (lora=none trains the whole model)")
    settings = _marked(skeleton, settings, scope)
    names = _targets(settings.get("target_modules"), layers, SCOPES[scope], scope)
    names -= _excluded(settings.get("exclude_modules"), names)
    names = _layers(settings.get("layers_to_transform"), settings.get("layers_pattern"), names)
    modules = [n for n, _ in skeleton.named_modules() if n]
    for name in settings.get("modules_to_save") or []:
        if not any(n == name or n.endswith(f".{name}") for n in modules):
            raise UserError(f"lora.modules_to_save: the model has no module {name}.{_leaf_hint(name, modules)}")
        names = {n for n in names if f".{name}." not in f".{n}."}  # trained whole, so not adapted too
    if not names:
        raise UserError("lora: no layer is left to adapt after exclude_modules, layers_to_transform and modules_to_save")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(key) or {}:
            if not any(_matches(rf"(.*\.)?({pattern})", n, f"lora.{key}.{pattern}") for n in names):  # peft's own rule
                raise UserError(f"lora.{key}.{pattern}: matches none of the {len(names)} adapted modules.{_leaf_hint(pattern, names)}")
    return Plan("lora", scope, settings, {n: layers[n] for n in sorted(names)}, linear)


def _marked(skeleton: Any, settings: dict[str, Any], scope: str) -> dict[str, Any]:
    """Settings left null, as an assembled model asks for them in its config: a random projector and new embedding rows
    must be trained, and so saved. `[]` says no to both."""
    marks = getattr(getattr(skeleton, "config", None), "mmft", None) or {}
    found = dict(settings)
    if found.get("modules_to_save") is None:
        found["modules_to_save"] = marks.get("modules_to_save")
    if found.get("trainable_token_indices") is None and marks.get("new_rows") and "language" in SCOPES[scope]:
        table = skeleton.get_input_embeddings()
        name = next(n for n, m in skeleton.named_modules() if m is table)
        found["trainable_token_indices"] = {name.split(".")[-1]: list(marks["new_rows"])}
    return found


def _targets(wanted: Any, layers: dict[str, str], parts: set[str], scope: str) -> set[str]:
    inside = {n for n, part in layers.items() if part in parts}
    if wanted == "all-linear":
        return {n for n in inside if n.split(".")[-1] != "lm_head"}
    if isinstance(wanted, str):
        found = {n for n in layers if _matches(wanted, n, f"lora.target_modules={wanted!r}")}
        if not found and any(n.endswith(f".{wanted}") for n in layers):
            raise UserError(f"lora.target_modules={wanted}: one word is a regular expression of whole names; for layers of that name write [{wanted}]")
        if not found:
            raise UserError(f"lora.target_modules={wanted!r} matches no linear layer.{_leaf_hint(wanted, layers)}")
        for name in sorted(found - inside):
            raise UserError(f"lora.target_modules={wanted!r} reaches {name} in the {layers[name]} part, outside lora.scope={scope}; narrow it or widen the scope")
        return found
    if not wanted:
        raise UserError("lora.target_modules: name the layers to adapt, e.g. [q_proj, v_proj], or all-linear")
    chosen: set[str] = set()
    for target in wanted:
        found = {n for n in layers if n == target or n.endswith(f".{target}")}
        if not found:
            raise UserError(f"lora.target_modules: no linear layer is called {target}.{_leaf_hint(target, layers)}")
        if not found & inside:
            where = ", ".join(sorted({layers[n] for n in found}))
            raise UserError(f"lora.target_modules: {target} lies only in the {where} part, outside lora.scope={scope}; use lora.scope=all or drop it")
        chosen |= found & inside
    return chosen


def _excluded(wanted: Any, names: set[str]) -> set[str]:
    if not wanted:
        return set()
    if isinstance(wanted, str):
        found = {n for n in names if _matches(wanted, n, f"lora.exclude_modules={wanted!r}")}
    else:
        found = {n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)}
    if not found:
        raise UserError(f"lora.exclude_modules={wanted}: excludes none of the {len(names)} targets.{_leaf_hint(str(wanted), names)}")
    return found


def _layers(wanted: Any, patterns: Any, names: set[str]) -> set[str]:
    """The names in layers `wanted`; a name's layer is its first number with something behind it, as peft takes it."""
    if wanted is None:
        if patterns:
            raise UserError("lora.layers_pattern: has no effect without lora.layers_to_transform=[...]; give both or drop it")
        return names
    patterns = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
    found = {n: next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", n))), None) for n in names}
    layer = {n: int(m.group(1)) for n, m in found.items() if m}
    if not layer:
        raise UserError(f"lora.layers_to_transform={wanted}: none of the {len(names)} targets lies in a numbered layer")
    indices = {wanted} if isinstance(wanted, int) else set(wanted)
    if indices - set(layer.values()):
        raise UserError(
            f"lora.layers_to_transform: there is no layer {min(indices - set(layer.values()))}; "
            f"layers go from {min(layer.values())} to {max(layer.values())}"
        )
    return {n for n, i in layer.items() if i in indices}


def _matches(pattern: str, name: str, where: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UserError(f"{where} is not a regular expression: {error}") from None


def _leaf_hint(word: str, names: Iterable[str]) -> str:
    leaves = sorted({n.split(".")[-1] for n in names if not n.split(".")[-1].isdigit()})
    return nearest(word, leaves) or f" There are: {', '.join(leaves[:12])}."


def target_pattern(names: Iterable[str]) -> str:
    """One anchored regular expression for a set of module names, layer numbers written as `\\d+` where all are meant."""
    names = set(names)
    loose = {re.sub(r"\.\d+(?=\.)", r".<n>", n) for n in names}
    pattern = "|".join(sorted(re.escape(n).replace("<n>", r"\d+") for n in loose))
    return pattern


def attach(model: Any, plan: Plan, seed: int = 0) -> Any:
    """The model with its adapter (PeftModel), or itself with the parts of `scope` trainable. Errors raised: UserError.

    seed: of the adapter's dropout; where training stands is told to the model's `dropout_stream` (mmft/adapters/seeded_dropout.py).
    """
    if plan.method == "full":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) in SCOPES[plan.scope])
        return model
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    from ..rewrites import gated_mlp, lora_linear, rms_norm, rotary
    from ..system import memory, startup
    from .seeded_dropout import seed_dropout

    settings = {k: v for k, v in plan.settings.items() if v is not None}
    if settings.get("init_lora_weights") == "loftq":
        startup.with_bitsandbytes()
    settings = arguments(settings, lora_config())
    pattern = target_pattern(plan.adapted)
    everywhere = {n for n, _ in model.named_modules() if re.fullmatch(pattern, n)}
    # layers_to_transform and exclude_modules are already in the plan; a list of full names says it exactly
    settings["target_modules"] = pattern if everywhere == set(plan.adapted) else sorted(plan.adapted)
    for done in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        settings.pop(done, None)
    try:
        peft_model = get_peft_model(model, LoraConfig(**settings))
    except (ValueError, TypeError, ImportError, NotImplementedError, KeyError, RuntimeError) as error:
        if memory.is_out(error):
            raise
        why = f"it misses the key {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:300]
        raise UserError(f"lora: peft refuses these settings: {why}") from None
    got = {n.removeprefix("base_model.model.") for n, m in peft_model.named_modules() if isinstance(m, LoraLayer)}
    if got != set(plan.adapted):
        odd = sorted(got ^ set(plan.adapted))
        raise UserError(f"lora: peft adapted {len(got)} modules where {len(plan.adapted)} were planned, e.g. {odd[0]}")
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # half-precision trained copies lose small steps (modules_to_save)
    whole_in_float(peft_model)
    peft_model.dropout_stream = seed_dropout(peft_model, seed)
    lora_linear.fuse(peft_model)
    peft_model.gated = gated_mlp.fuse(peft_model)
    peft_model.normed = rms_norm.fuse(peft_model)
    peft_model.ways = rotary.ways(peft_model)
    return peft_model


def whole_in_float(model: Any) -> None:
    """Modules trained whole (modules_to_save) compute in fp32 inside a half-precision base, also where no autocast is open.

    Training runs under autocast, measuring and every later verb do not: without the casts an fp32 projector refuses bf16 states.
    """
    import torch
    from peft.utils.other import ModulesToSaveWrapper

    def cast(value: Any, dtype: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    def before(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(cast(a, torch.float32) for a in args)

    for wrapper in [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]:
        half = next((p.dtype for p in wrapper.original_module.parameters()), torch.float32)
        if half not in (torch.float16, torch.bfloat16):
            continue
        for module in wrapper.modules_to_save.values():
            module.float()
            module.register_forward_pre_hook(before)
            module.register_forward_hook(lambda module, args, output, half=half: cast(output, half))


def report(model: Any, plan: Plan) -> dict[str, Any]:
    """The table of what is trained, by part (the run's lora_plan.json)."""
    from peft.tuners.lora import LoraLayer

    ranks: dict[str, set] = {}
    scales: dict[str, set] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            ranks.setdefault(part_of(name), set()).update(module.r.values())
            scales.setdefault(part_of(name), set()).update(module.scaling.values())
    rows = []
    for part in PARTS:
        own = [(p, size(p)) for n, p in model.named_parameters() if part_of(n) == part and ".original_module." not in n]
        if not own:
            continue
        scale = sorted(scales.get(part, ()))
        rows.append(
            {
                "part": part,
                "modules": sum(p == part for p in plan.adapted.values()),
                "linear": plan.linear.get(part, 0),
                "r": ", ".join(map(str, sorted(ranks.get(part, ())))),
                "scale": scale[0] if len(scale) == 1 else None if not scale else scale[-1],
                "trainable": sum(n for p, n in own if p.requires_grad),
                "total": sum(n for _, n in own),
            }
        )
    return {
        "method": plan.method,
        "scope": plan.scope,
        "rows": rows,
        "trainable_parameters": sum(r["trainable"] for r in rows),
        "total_parameters": sum(r["total"] for r in rows),
        "modules_to_save": list(plan.settings.get("modules_to_save") or []),
    }
