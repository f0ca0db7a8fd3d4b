"""Initialisations of LoRA that need a pass over training batches (EVA, CorDA, LoRA-GA) or the weights before they were quantised (LoftQ).

    EVA      A: the main directions of each layer's inputs, B = 0; ranks go where they explain most (Paischer et al. 2024, arXiv 2410.07170)
    CorDA    A, B: a part of W, as the covariance of its inputs orders it; W without it stays behind (Yang et al. 2024, arXiv 2406.05223)
    LoRA-GA  A, B: directions of the gradient of W; W without s B A stays behind (Wang et al. 2024, arXiv 2407.05000)
    LoftQ    A, B: s B A is the best correction of that rank of what quantising took away, W - Q (Li et al. 2023, arXiv 2310.08659, one step)

peft computes the first three. Its LoftQ needs a GPU, takes the weights by their names in the file and leaves out the scale s.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..common.errors import UserError, nearest
from ..config.settings import Section
from ..losses.supervised import supervised_logits, supervised_loss
from ..system.memory import is_out_of_memory
from .parts import rank_and_alpha

if TYPE_CHECKING:
    import torch

log = logging.getLogger("mmft")

EVA, CORDA, LORA_GA, LOFTQ = "eva", "corda", "lora_ga", "loftq"
WITH_BATCHES = (EVA, CORDA, LORA_GA)
TITLES = {EVA: "EVA", CORDA: "CorDA", LORA_GA: "LoRA-GA", LOFTQ: "LoftQ"}
# key of lora -> its initialisation, and its own keys with the values that each may have (None: a number)
SETTINGS: dict[str, tuple[str, dict[str, tuple[Any, ...] | None]]] = {
    "eva_config": (EVA, {"rho": None, "tau": None, "use_label_mask": (True, False), "whiten": (True, False), "adjust_scaling_factors": (True, False)}),
    "corda_config": (CORDA, {"corda_method": ("ipm", "kpm"), "use_float16_for_covariance": (True, False)}),
    "lora_ga_config": (LORA_GA, {"direction": ("ArBr", "A2rBr", "ArB2r", "random"), "scale": ("stable", "weight_svd", "gd_scale", "unit"), "stable_gamma": None}),
}
BATCHES = 8  # of lora.init_batches, where it is not given
RHO = 2.0  # peft's own eva_config.rho
PASSES = 400  # forward passes after which EVA's directions should have settled


@dataclass(frozen=True)
class StartSources:
    """batches: of training rows on the model's device; True for one row in each. original: the weights of the adapted layers before they were quantised, by name."""

    batches: Callable[[bool], Sequence[dict[str, Any]]]
    original: Callable[[], Mapping[str, torch.Tensor]]


def start_of(settings: Section) -> str | None:
    """Which of these initialisations `lora.init_lora_weights` asks for; None for any other."""
    name = settings.get("init_lora_weights")
    return name if name in TITLES else None


def check_start_settings(settings: Section, batches: Any) -> list[str]:
    """Notes on the initialisation for the plan. batches: lora.init_batches. Raises UserError for keys and values that it does not take."""
    start = start_of(settings)
    for key, (owner, own) in SETTINGS.items():
        values = settings.get(key)
        if values in (None, {}):
            continue
        if start != owner:
            raise UserError(f"lora.{key}: has an effect with lora.init_lora_weights={owner} alone; add that, or drop it")
        if not isinstance(values, Mapping):
            raise UserError(f"lora.{key}={values}: must be keys with values, e.g. lora.{key}.{next(iter(own))}=...; there are: {', '.join(own)}")
        for name, value in values.items():
            if name not in own:
                raise UserError(f"lora.{key}.{name}: no such key.{nearest(str(name), own)} There are: {', '.join(own)}.")
            allowed = own[name]
            if allowed is None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise UserError(f"lora.{key}.{name}={value}: must be a number")
            if allowed is not None and value not in allowed:
                raise UserError(f"lora.{key}.{name}={value}: must be one of {', '.join(str(a).lower() if isinstance(a, bool) else a for a in allowed)}")
    if start is None:
        return []
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise UserError(f"lora.init_batches={batches}: must be a whole number of batches above 0")
    for key in ("lora_bias", "target_parameters"):
        if settings.get(key):
            raise UserError(f"lora.init_lora_weights={start}: is for linear layers and their matrices A and B; drop lora.{key}")
    if start == LOFTQ:
        return ["LoftQ: the adapter begins with the best correction of its rank of what quantising the base took away"]
    first = f"{TITLES[start]}: the adapter begins with what {batches} batches of training rows say of each layer"
    if start == EVA:
        rho = float((settings.get("eva_config") or {}).get("rho", RHO))
        return [first + (f"; ranks move between layers, up to {round(settings['r'] * rho)}" if rho > 1 else "")]
    return [f"{first}; the saved adapter has twice the rank, over the original base"]


def check_start_layers(settings: Section, layers: Mapping[str, torch.nn.Module]) -> None:
    """Raises UserError for a layer (weights are not needed) that the initialisation cannot serve at its rank."""
    import torch

    start = start_of(settings)
    if start is None:
        return
    factor = {EVA: 2 * float((settings.get("eva_config") or {}).get("rho", RHO)), LORA_GA: 2.0}.get(start, 1.0)
    for name, module in layers.items():
        if not isinstance(module, torch.nn.Linear):
            raise UserError(f"lora.init_lora_weights={start}: {name} is no linear layer; leave it out of lora.target_modules")
        rank, _ = rank_and_alpha(settings, name)
        needed, there = round(rank * factor), module.in_features if start == EVA else min(module.in_features, module.out_features)
        if needed > there:
            why = {EVA: "twice eva_config.rho times the rank", LORA_GA: "twice the rank"}.get(start, "the rank")
            raise UserError(f"lora.init_lora_weights={start}: takes {needed} directions ({why}) of {name}, which has {there}; lower lora.r, or leave the layer out")


def check_start_base(settings: Section, quantised: bool, saved: bool, sharded: str | None) -> None:
    """Raises UserError for a base that the initialisation cannot begin on. saved: its own files are quantised. sharded: the key that spreads it over processes."""
    start = start_of(settings)
    if start is None:
        return
    if start == LOFTQ and not quantised:
        raise UserError("lora.init_lora_weights=loftq: corrects what quantising took away, and this base is not quantised; add model.quantization.load_in_4bit=true, or use pissa")
    if start == LOFTQ and saved:
        raise UserError("lora.init_lora_weights=loftq: needs the weights before they were quantised, and this checkpoint was saved quantised; use eva, or an unquantised checkpoint")
    if start in (CORDA, LORA_GA) and quantised:
        raise UserError(f"lora.init_lora_weights={start}: takes a part out of the base's weights, and quantised ones would be rounded; use loftq or eva, or an unquantised base")
    if sharded is not None:
        raise UserError(f"lora.init_lora_weights={start}: needs the base whole on one device; drop trainer.{sharded}")


def peft_values(settings: Section) -> dict[str, Any]:
    """Keys of LoraConfig with peft's objects for the initialisation. LoftQ and no initialisation of this module: {}."""
    start = start_of(settings)
    if start is None:
        return {}
    from peft import EvaConfig, LoraGAConfig
    from peft.tuners.lora import config

    if start == LOFTQ:
        return {"init_lora_weights": True}
    kind: Any = {EVA: EvaConfig, CORDA: config.CordaConfig, LORA_GA: LoraGAConfig}[start]
    key = f"{start}_config"
    own = {"use_label_mask": False} if start == EVA else {}  # answers are often shorter than the number of directions
    return {key: kind(**{**own, **(settings.get(key) or {})})}


def before_peft(model: Any, config: Any, settings: Section, sources: StartSources, adapted: Sequence[str]) -> None:
    """The pass of CorDA and LoRA-GA over the base. config: of peft. adapted: names of the layers.

    Raises UserError for a layer that no row reaches (CorDA), or if all are such.
    """
    start = start_of(settings)
    if start not in (CORDA, LORA_GA):
        return
    modules = {name: model.get_submodule(name) for name in adapted}

    def run() -> None:
        import torch

        model.eval()  # no dropout in what is measured; freeze() decides about training later
        rows = sources.batches(start == CORDA)  # peft's CorDA takes the inputs of one row at a time
        for batch in rows:
            if start == CORDA:
                with torch.no_grad():
                    supervised_logits(model, batch)
            else:
                loss, count = supervised_loss(model, batch)
                if loss.requires_grad:  # not if no adapted layer takes part
                    (loss / count).backward()
        idle = [name for name, module in modules.items() if (not module.sample_count if start == CORDA else module.weight.grad is None)]
        if idle and (start == CORDA or len(idle) == len(modules)):
            raise UserError(f"lora.init_lora_weights={start}: {idle[0]} takes no part in answering the first {len(rows)} batches; leave it out (lora.exclude_modules)")
        if idle:  # LLaVA's last vision layer
            log.info("%-14s %s: %d of %d layers get no gradient, e.g. %s, and begin as plain LoRA", "adapter", TITLES[start], len(idle), len(modules), idle[0])

    was_training = model.training
    needed = {name: p.requires_grad for name, p in model.named_parameters()}
    with _quietly(start):
        if start == CORDA:
            from peft.tuners.lora.corda import preprocess_corda

            preprocess_corda(model, config, run)
        else:
            from peft import preprocess_loraga

            preprocess_loraga(model, config, run)
    model.train(was_training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(needed[name])
        parameter.grad = None


def after_peft(peft_model: Any, settings: Section, sources: StartSources) -> None:
    """EVA and LoftQ on the attached adapter; EVA takes the adapter off layers to which it gives no rank. Raises UserError."""
    start = start_of(settings)
    if start == EVA:
        _eva(peft_model, peft_model.peft_config["default"], sources.batches(False))
    if start == LOFTQ:
        _loftq(peft_model, sources.original())


def _eva(peft_model: Any, config: Any, batches: Sequence[dict[str, Any]]) -> None:
    import torch
    from peft import initialize_lora_eva_weights

    needed = 2 * round(max([config.r, *(config.rank_pattern or {}).values()]) * config.eva_config.rho)  # the width of peft's randomised SVD
    for batch in batches:
        tokens = int(_mask(batch, config).sum())
        if tokens < needed:
            raise UserError(
                f"lora.init_lora_weights=eva: a batch has {tokens} tokens, and rank {config.r} needs {needed} in each (twice eva_config.rho times the rank); raise"
                " trainer.per_device_train_batch_size, or lower lora.r or lora.eva_config.rho"
            )
    passes = 0

    def forward(model: Any, wrapped: _Batch) -> None:
        nonlocal passes
        passes += 1
        if passes > PASSES:
            raise UserError(f"lora.init_lora_weights=eva: the directions have not settled after {PASSES} batches; lower lora.eva_config.tau, or raise lora.init_batches")
        with torch.no_grad():
            supervised_logits(model, wrapped.values)

    with _quietly(EVA):
        initialize_lora_eva_weights(
            peft_model, [_Batch(b) for b in batches], forward_fn=forward, prepare_model_inputs_fn=lambda wrapped, config: _mask(wrapped.values, config),
            prepare_layer_inputs_fn=_tokens, gather_distributed_inputs=False, show_progress_bar=False,
        )  # fmt: skip
    config.init_lora_weights, config.eva_config = True, None  # a plain adapter from here on


class _Batch:
    """A batch that peft hands through as it is."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def to(self, device: object) -> _Batch:
        return self


def _mask(batch: Mapping[str, Any], config: Any) -> torch.Tensor:
    """(B, S) bool: the tokens that count."""
    import torch

    mask = batch.get("attention_mask")
    chosen = torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return chosen & (batch["labels"] != config.eva_config.label_mask_value) if config.eva_config.use_label_mask else chosen


def _tokens(layer_input: Any, mask: torch.Tensor, name: str) -> torch.Tensor:
    """(n, d): a layer's inputs at the tokens that count; all of them in parts that see images, not tokens."""
    x: torch.Tensor = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    flat = x.reshape(-1, x.shape[-1])
    return flat[mask.flatten()] if len(flat) == mask.numel() else flat


def _loftq(peft_model: Any, original: Mapping[str, torch.Tensor]) -> None:
    import torch
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    left = []
    for full, layer in peft_model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        name, base = full.removeprefix("base_model.model."), layer.get_base_layer()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        with torch.no_grad():
            whole = original[name].to(a.device, torch.float32)
            kept = base.weight if base.weight.is_floating_point() and base.weight.shape == whole.shape else dequantize_module_weight(base)
            residual = whole - kept.to(whole)
            u, s, v = torch.linalg.svd(residual, full_matrices=False)
            r, root = a.shape[0], (s[: a.shape[0]] / layer.scaling["default"]).sqrt()
            a.copy_(root[:, None] * v[:r])
            b.copy_(u[:, :r] * root)
            size = float(s.square().sum())
            left.append(1 - float(s[:r].square().sum()) / size if size else 0.0)
    log.info("%-14s LoftQ: %.0f %% of what quantising took away is left (squared, mean over %d layers)", "adapter", 100 * sum(left) / max(len(left), 1), len(left))


@contextlib.contextmanager
def _quietly(start: str) -> Iterator[None]:
    """peft's errors as one line, without its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, RuntimeError, TypeError, IndexError, ZeroDivisionError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"lora.init_lora_weights={start}: peft cannot compute it for this model: {reason}; use lora.init_lora_weights=true or pissa") from None
