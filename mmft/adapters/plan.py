"""Decide which modules get an adapter, on a model without weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..common.errors import UserError, nearest
from ..common.model_parts import PARTS, part_of
from ..config.settings import Section
from .experts import choosing_layers, planned_parameters, unreachable_layers
from .methods import DORA, LORA, METHODS, check_layers, check_settings, choose
from .parts import part_patterns, top_layer_parameters, whole_modules
from .starts import BATCHES, check_start_layers, check_start_settings

if TYPE_CHECKING:
    import torch

# What all-linear leaves out, beside routers: the language head; indexers, which choose tokens and get no gradient; and Gemma 3n's mixing of its
# parallel inputs, part of which reads its weights around an adapter.
NOT_LINEAR = {"lm_head", "indexer", "altup"}
# Rows have no sound and answers no images: what reads or makes them stays as it is.
SCOPES = {"language": {"language"}, "vision": {"vision"}, "connector": {"connector"}, "all": set(PARTS) - {"audio", "generator"}}


@dataclass
class AdapterPlan:
    """What will be trained. `settings` are the given keys of LoraConfig. method: an adapter ("lora"), or the weights themselves.

    adapted: name of a module -> its part. parameters: the same for expert tensors (lora.target_parameters). linear: part -> number of
    linear layers there are. unreachable: layers that all-linear means and peft cannot adapt (experts.unreachable_layers). whole: modules
    trained whole beside the adapter (lora.whole) -> their part. trained: the parameters of full training; None for all inside the scope.
    top_layers: how many they are. adapter: the method of peft (lora.method), of METHODS. options: its own keys. notes: what the table cannot say. init_batches: of training rows, from which
    some initialisations begin.
    """

    method: Literal["lora", "full"]
    scope: str
    settings: Section
    adapted: dict[str, str] = field(default_factory=dict)
    linear: dict[str, int] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    unreachable: list[str] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    trained: set[str] | None = None
    top_layers: int | None = None
    adapter: str = LORA
    options: Section = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    init_batches: int = BATCHES

    @property
    def is_lora(self) -> bool:
        """Whether peft makes LoRA layers: for lora and dora."""
        return self.method == "lora" and METHODS[self.adapter].config == "LoraConfig"

    def trains(self, name: str) -> bool:
        """Whether full training updates a parameter."""
        return part_of(name) in SCOPES[self.scope] if self.trained is None else name in self.trained


def plan_adapter(skeleton: torch.nn.Module, settings: Section) -> AdapterPlan:
    """The modules of a model (weights are not needed) that get an adapter.

    A list of names means the modules of these names inside `scope`: q_proj of LLaVA is then the language model's, not CLIP's. Raises
    UserError for a name that no module has, or only modules outside the scope, and for a regular expression that matches outside it.
    """
    import torch

    settings = dict(settings)
    scope = settings.pop("scope", "language")
    parts, whole, top_layers = settings.pop("parts", None), settings.pop("whole", None), settings.pop("top_layers", None)
    if scope not in SCOPES:
        raise UserError(f"lora.scope={scope}: no such scope.{nearest(str(scope), SCOPES)} There are: {', '.join(SCOPES)}.")
    layers = {n: part_of(n) for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Linear)}
    linear = {part: sum(p == part for p in layers.values()) for part in PARTS}
    if settings.get("r") is None:
        extra = sorted(k for k, v in {**settings, "parts": parts or None, "whole": whole or None}.items() if v is not None)
        if extra:
            raise UserError(f"lora.{extra[0]}: without lora.r the whole model is trained, and this key has no effect; set lora.r or drop it")
        trained = None if top_layers is None else top_layer_parameters(skeleton, scope, SCOPES[scope], top_layers)
        return AdapterPlan("full", scope, {}, {}, linear, trained=trained, top_layers=top_layers)
    if top_layers is not None:
        raise UserError(f"lora.top_layers={top_layers}: is for lora=none; lora.layers_to_transform=[...] chooses the layers that an adapter reaches")
    settings.pop("start", None)  # which weights the adapter begins with changes nothing of the plan
    if not isinstance(settings["r"], int) or settings["r"] < 1:
        raise UserError(f"lora.r={settings['r']}: must be a whole number above 0 (lora=none trains the whole model)")
    init_batches = settings.pop("init_batches", BATCHES)
    adapter, options = str(settings.pop("method", None) or LORA), dict(settings.pop("options", None) or {})
    method = choose(adapter, options)
    if adapter == DORA:
        settings["use_dora"] = True
    settings = _with_marks(skeleton, settings, scope)
    notes = check_settings(method, settings) + check_start_settings(settings, init_batches)
    whole_names = whole_modules(skeleton, whole) if whole else {}
    if whole_names:
        settings["modules_to_save"] = [*(settings.get("modules_to_save") or []), *whole_names]
    wanted = settings.get("target_modules")
    if not isinstance(wanted, str):  # token tables get an adapter only if they are named
        layers |= {n: part_of(n) for n, m in skeleton.named_modules() if isinstance(m, torch.nn.Embedding) and n.split(".")[-1] in (wanted or ())}
    parameters = planned_parameters(skeleton, settings, SCOPES[scope], scope)
    names = _targets(wanted, layers, SCOPES[scope], scope) if wanted or not parameters else set()
    unreachable = unreachable_layers(skeleton, names)
    if wanted == "all-linear":
        names -= choosing_layers(skeleton) | unreachable
    elif unreachable:
        name = min(unreachable)
        raise UserError(f"lora.target_modules: peft takes {name.split('.')[-1]} of {name} for this model's experts and cannot adapt this layer; lora.target_parameters adapts the experts")
    names -= _excluded(settings.get("exclude_modules"), names)
    names = _layers(settings.get("layers_to_transform"), settings.get("layers_pattern"), names)
    modules = [n for n, _ in skeleton.named_modules() if n]
    for name in settings.get("modules_to_save") or []:
        if not any(n == name or n.endswith(f".{name}") for n in modules):
            raise UserError(f"lora.modules_to_save: the model has no module {name}.{_leaf_hint(name, modules)}")
        names = {n for n in names if f".{name}." not in f".{n}."}  # trained as a whole, so not adapted as well
    left_out, ranks, alphas = part_patterns(parts or {}, {n: layers[n] for n in names}, SCOPES[scope], scope, skeleton)
    names -= left_out
    for key, own in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if own:
            settings[key] = {**(settings.get(key) or {}), **own}
    check_settings(method, settings)  # ranks of parts are patterns
    if not names and not parameters:
        raise UserError("lora: no layer is left to adapt after exclude_modules, layers_to_transform and modules_to_save")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in settings.get(key) or {}:
            if not any(_matches(rf"(.*\.)?({pattern})", n, f"lora.{key}.{pattern}") for n in names):  # peft's own rule
                raise UserError(f"lora.{key}.{pattern}: matches none of the {len(names)} adapted modules.{_leaf_hint(pattern, names)}")
    modules_by_name = dict(skeleton.named_modules())
    notes += check_layers(method, options, {n: modules_by_name[n] for n in sorted(names)})
    check_start_layers(settings, {n: modules_by_name[n] for n in sorted(names)})
    return AdapterPlan(
        "lora", scope, settings, {n: layers[n] for n in sorted(names)}, linear, parameters, sorted(unreachable - names), whole_names,
        adapter=adapter, options=options, notes=notes, init_batches=init_batches,
    )  # fmt: skip


def _with_marks(skeleton: Any, settings: Section, scope: str) -> Section:
    """The settings, with null values filled in from the config of an assembled model (mmft assemble).

    Its projector is random and its embedding table may have new rows; both must be trained and saved. `[]` refuses both.
    """
    marks = getattr(getattr(skeleton, "config", None), "mmft", None) or {}
    completed = dict(settings)
    if completed.get("modules_to_save") is None:
        completed["modules_to_save"] = marks.get("modules_to_save")
    if completed.get("trainable_token_indices") is None and marks.get("new_rows") and "language" in SCOPES[scope]:
        table = skeleton.get_input_embeddings()
        name = next(n for n, m in skeleton.named_modules() if m is table)
        completed["trainable_token_indices"] = {name.split(".")[-1]: list(marks["new_rows"])}
    return completed


def _targets(wanted: str | Sequence[str] | None, layers: Mapping[str, str], parts: set[str], scope: str) -> set[str]:
    inside = {n for n, part in layers.items() if part in parts}
    if wanted == "all-linear":
        return {n for n in inside if NOT_LINEAR.isdisjoint(n.split("."))}
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


def _excluded(wanted: str | Sequence[str] | None, names: set[str]) -> set[str]:
    if not wanted:
        return set()
    if isinstance(wanted, str):
        found = {n for n in names if _matches(wanted, n, f"lora.exclude_modules={wanted!r}")}
    else:
        found = {n for n in names if any(n == w or n.endswith(f".{w}") for w in wanted)}
    if not found:
        raise UserError(f"lora.exclude_modules={wanted}: excludes none of the {len(names)} targets.{_leaf_hint(str(wanted), names)}")
    return found


def _layers(wanted: int | Sequence[int] | None, patterns: str | Sequence[str] | None, names: set[str]) -> set[str]:
    """The names in the layers `wanted`. The layer of a name is its first number that is followed by more, as in peft."""
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
