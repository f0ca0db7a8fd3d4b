"""The methods of peft beside LoRA that `lora.method` chooses: which keys of `lora` they have, and their own keys (`lora.options`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..config.settings import Section
from .parts import rank_and_alpha

if TYPE_CHECKING:
    import torch

LORA, DORA = "lora", "dora"  # dora is LoRA with use_dora=true


@dataclass(frozen=True)
class Method:
    """title: in tables. config: its class in peft. keys: a key of `lora` -> the method's own name for it. options: further keys of the class -> their kind.

    fixed: values that peft needs and nobody chooses. init: the method's name for init_lora_weights (true or false). bits: of quantised bases that peft
    trains it over.
    """

    title: str
    config: str
    keys: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, type | tuple[type, ...]] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    init: str = "init_weights"
    bits: tuple[int, ...] = ()


_RANKED = {"r": "r", "lora_alpha": "alpha", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern"}
METHODS = {
    LORA: Method("LoRA", "LoraConfig", bits=(4, 8)),
    DORA: Method("DoRA", "LoraConfig", bits=(4, 8)),
    "vera": Method("VeRA", "VeraConfig", {"r": "r", "lora_dropout": "vera_dropout"}, {"d_initial": (int, float), "projection_prng_key": int}, bits=(4, 8)),
    "oft": Method(
        "OFT", "OFTConfig", {},
        {"oft_block_size": int, "coft": bool, "eps": (int, float), "block_share": bool, "use_cayley_neumann": bool, "num_cayley_neumann_terms": int},
        {"r": 0}, bits=(4, 8),
    ),
    "ia3": Method("IA3", "IA3Config", {}, {"feedforward_modules": list}, init="init_ia3_weights", bits=(4, 8)),
    "loha": Method("LoHa", "LoHaConfig", _RANKED),
    "lokr": Method("LoKr", "LoKrConfig", _RANKED, {"decompose_both": bool, "decompose_factor": int}),
    "hra": Method("HRA", "HRAConfig", {"r": "r"}, {"apply_GS": bool}),
    "fourierft": Method("FourierFT", "FourierFTConfig", {}, {"n_frequency": int, "scaling": (int, float), "random_loc_seed": int}),
}  # fmt: skip

_PROMPT = "puts trained tokens before the prompt, and the places of images in a row would no longer be those that mmft counts; use lora.method=lora"
_UNTRIED = "was not tried with vision-language models here; use lora.method=lora"
REFUSED = {
    **dict.fromkeys(("prompt_tuning", "multitask_prompt_tuning", "p_tuning", "prefix_tuning", "cpt", "adaption_prompt", "cartridge"), _PROMPT),
    "boft": "holds a square matrix of each layer's width and compiles a CUDA kernel when it starts; use lora.method=oft, which rotates blocks without either",
    "adalora": "must be told of every step to move ranks between layers, which mmft's training does not do; use lora.init_lora_weights=eva, which distributes them before the first step",
    "xlora": "mixes finished adapters; use mmft combine", "poly": "mixes several tasks' adapters; use mmft combine",
    "ln_tuning": "trains the norms themselves; use lora=default lora.modules_to_save=[norm]",
    "trainable_tokens": "is a key beside an adapter; use lora.trainable_token_indices=[...]",
    "rslora": "is LoRA with another scale; use lora.use_rslora=true", "qlora": "is LoRA over a quantised base; use model.quantization.load_in_4bit=true",
    **dict.fromkeys(("pissa", "olora", "eva", "corda", "lora_ga", "loftq"), "is an initialisation of LoRA; use lora.init_lora_weights=..."),
    **dict.fromkeys((
        "adamss", "beft", "c3a", "deft", "delora", "frod", "glora", "gralora", "hira", "lily", "miss", "osf", "peanut", "psoft", "pvera", "randlora", "road", "shadow", "shira",
        "supertuning", "tinylora", "unilora", "vblora", "waveft",
    ), _UNTRIED),
}  # fmt: skip

# Keys of LoraConfig that other methods lack, and their values that ask for nothing. rank, alpha and dropout have values in conf/lora/default.yaml, so
# they are told to have no effect; these must be asked for, so they are refused.
_LORA_ONLY: dict[str, tuple[Any, ...]] = {
    "use_rslora": (None, False), "use_dora": (None, False), "lora_bias": (None, False), "bias": (None, "none"), "init_lora_weights": (None, True, False),
    "target_parameters": (None, []), "trainable_token_indices": (None, [], {}), "rank_pattern": (None, {}), "alpha_pattern": (None, {}),
    "eva_config": (None, {}), "corda_config": (None, {}), "lora_ga_config": (None, {}),
}  # fmt: skip
_TOLD = {"r": "no rank", "lora_alpha": "no alpha", "lora_dropout": "no dropout"}
FEEDFORWARD = ("down_proj", "fc2")  # the second layer of an MLP, whose input IA3 scales (peft scales the output of all others)
BLOCK = 32  # peft's own oft_block_size
FREQUENCIES = 1000  # peft's own n_frequency


def choose(name: str, options: Mapping[str, Any] | None) -> Method:
    """The method that `lora.method` names. Raises UserError for one that does not exist or is refused, and for options that it has not."""
    name = str(name)
    if name in REFUSED:
        raise UserError(f"lora.method={name}: {REFUSED[name]}")
    if name not in METHODS:
        raise UserError(f"lora.method={name}: no such method.{nearest(name, METHODS)} There are: {', '.join(METHODS)}.")
    method = METHODS[name]
    for key, value in (options or {}).items():
        if key not in method.options:
            there = ", ".join(method.options) or "none: its keys are those of lora"
            raise UserError(f"lora.options.{key}: {method.title} has no such key.{nearest(str(key), method.options)} There are: {there}.")
        kind = method.options[key]
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool) and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            raise UserError(f"lora.options.{key}={value}: must be {' or '.join(k.__name__ for k in kinds)}")
    return method


def check_settings(method: Method, settings: Section) -> list[str]:
    """What keys of `lora` do not do with this method, for the plan's notes. Raises UserError for a key that only LoRA has."""
    if method.config == "LoraConfig":
        return []
    for key, nothing in _LORA_ONLY.items():
        if key not in method.keys and settings.get(key) not in nothing:
            more = " (lora.parts.PART.r=0 alone, to leave a part out)" if key == "rank_pattern" else ""
            raise UserError(f"lora.{key}={settings[key]}: is a key of LoRA, and {method.title} has nothing like it; drop it, or use lora.method=lora{more}")
    if method.title == "HRA" and settings["r"] % 2:
        raise UserError(f"lora.r={settings['r']}: HRA begins as the base model only with an even rank; use lora.r={settings['r'] + 1}")
    told = [key for key in _TOLD if key not in method.keys and settings.get(key)]
    if not told:
        return []
    return [f"{method.title} has {_listed([_TOLD[key] for key in told])}: {_listed([f'lora.{key}' for key in told])} {'have' if len(told) > 1 else 'has'} no effect"]


def check_layers(method: Method, options: Mapping[str, Any], layers: Mapping[str, torch.nn.Module]) -> list[str]:
    """Notes on what the method does in these layers (name -> module, weights not needed). Raises UserError for an option that does not fit them."""
    import torch

    if method.config == "LoraConfig":
        return []
    odd = next((n for n, m in layers.items() if not isinstance(m, torch.nn.Linear)), None)
    if odd is not None:
        raise UserError(f"lora.target_modules: {odd} is no linear layer, and {method.title} adapts linear layers alone; leave it out, or use lora.method=lora")
    shapes: dict[str, tuple[int, int]] = {n: tuple(m.weight.shape) for n, m in layers.items() if isinstance(m, torch.nn.Linear)}
    if method.title == "IA3":
        if wanted := options.get("feedforward_modules"):
            missing = [w for w in wanted if not any(n == w or n.endswith(f".{w}") for n in layers)]
            if missing:
                leaves = sorted({n.split(".")[-1] for n in layers})
                raise UserError(f"lora.options.feedforward_modules: no adapted layer is called {missing[0]}.{nearest(str(missing[0]), leaves)} There are: {', '.join(leaves)}.")
        return [f"IA3 scales the input of {_listed(feedforward(options, layers)) or 'no layer'}, and the output of the others"]
    if method.title == "OFT":
        size = options.get("oft_block_size") or BLOCK
        if size < 2:
            raise UserError(f"lora.options.oft_block_size={size}: must be a whole number above 1")
        uneven = [n for n, (_, width) in shapes.items() if width % size]
        notes = [f"OFT rotates blocks of {size} inputs"]
        if uneven:
            notes.append(f"{size} does not divide the width of {len(uneven)} layers, e.g. {uneven[0]} ({shapes[uneven[0]][1]}); peft takes the nearest number that does there")
        return notes
    if method.title == "FourierFT":
        count = options.get("n_frequency") or FREQUENCIES
        small = next((n for n, (out, width) in shapes.items() if out * width < count), None)
        if count < 1 or small is not None:
            why = f"{small} has only {shapes[small][0] * shapes[small][1]} weights" if small is not None else "must be above 0"
            raise UserError(f"lora.options.n_frequency={count}: {why}; choose a smaller number, or leave the layer out (lora.exclude_modules)")
        return [f"FourierFT trains {count} coefficients of each layer"]
    return []


def feedforward(options: Mapping[str, Any], layers: Iterable[str]) -> list[str]:
    """The names of the layers whose input IA3 scales."""
    wanted = options.get("feedforward_modules")
    return sorted(wanted if wanted is not None else {leaf for n in layers if (leaf := n.split(".")[-1]) in FEEDFORWARD})


def check_base(method: Method, bits: int | None) -> None:
    """Raises UserError for a quantised base that peft does not train the method over. bits: of its weights; None if it is not quantised."""
    if bits is not None and bits not in method.bits:
        others = ", ".join(name for name, other in METHODS.items() if bits in other.bits)
        raise UserError(f"lora.method={method.title.lower()}: peft does not train it over a base in {bits} bit; use an unquantised base, or lora.method={others}")


def peft_config(method: Method, settings: Section, options: Mapping[str, Any], targets: str | Sequence[str], layers: Iterable[str]) -> Any:
    """peft's config object of a method other than LoRA. targets: what peft takes as target_modules. layers: the names that they match."""
    import peft

    values = {own: settings[key] for key, own in method.keys.items() if settings.get(key) is not None}
    values |= {key: value for key, value in options.items() if value is not None} | dict(method.fixed)
    values[method.init] = settings.get("init_lora_weights") is not False
    if settings.get("modules_to_save"):
        values["modules_to_save"] = list(settings["modules_to_save"])
    if method.title == "OFT":
        values.setdefault("oft_block_size", BLOCK)
    if method.title == "IA3":
        inputs = feedforward(options, layers)  # beside a list of targets peft takes some of that list only
        values["feedforward_modules"] = inputs if isinstance(targets, str) else [n for n in targets if any(n == w or n.endswith(f".{w}") for w in inputs)]
    return getattr(peft, method.config)(target_modules=targets if isinstance(targets, str) else list(targets), **values)


def added_parameters(method: Method, settings: Section, options: Mapping[str, Any], layers: Mapping[str, torch.nn.Module]) -> dict[str, int]:
    """name -> number of weights that a method other than LoRA trains in each of these linear layers, which need no weights.

    peft itself is asked, on layers of the same shapes without memory.
    """
    import torch
    from peft import get_peft_model

    found: dict[tuple[Any, ...], int] = {}
    result = {}
    for name, module in layers.items():
        out, width = module.weight.shape
        leaf = name.split(".")[-1]
        own = {**settings, **dict.fromkeys(("modules_to_save", "rank_pattern", "alpha_pattern")), "r": rank_and_alpha(settings, name)[0]}
        key = (out, width, own["r"], leaf in feedforward(options, [leaf]))
        if key not in found:
            probe = torch.nn.ModuleDict({leaf: torch.nn.Linear(width, out, bias=False, device="meta")})
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tuned = get_peft_model(probe, peft_config(method, own, options, [leaf], [leaf]), low_cpu_mem_usage=True)
            found[key] = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
        result[name] = found[key]
    return result


def shown(name: str, lora: Mapping[str, Any]) -> list[str]:
    """`key value` of what decides a method's adapter, for texts. lora: the config's section."""
    method = METHODS.get(name, METHODS[LORA])
    if method.config == "LoraConfig":
        keys: Iterable[str] = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
    else:
        keys = (*(key for key in method.keys if not key.endswith("_pattern")), "target_modules")
    return [f"{k} {lora[k]}" for k in keys if lora.get(k) is not None] + [f"{k} {v}" for k, v in (lora.get("options") or {}).items() if v is not None]


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""
