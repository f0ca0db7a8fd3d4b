"""trainer.torch_compile: torch compiles the layers of the language model, for the passes of training.

Each layer is compiled by itself: what depends on the rows (where image tokens stand, masks, which logits are needed) lies between and around them. Layers of one
class share what was compiled. Evaluations and answers run the layers as they are.

Numbers of rows and tokens are variables from the first batch on (`dynamic=True`). So another length compiles nothing, and what computes a batch does not depend on
the batches before it: a resumed run, which sees other batches first, computes the same bits.
"""

from __future__ import annotations

import functools
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters.freeze import FUNCTIONAL_DROPOUT
from ..adapters.methods import METHODS
from ..common.errors import UserError, nearest
from ..common.private_api import keep_graphs_whole
from ..config.library_keys import COMPILE
from ..config.settings import Section, Settings, sharded_by
from ..rewrites.base import Replaced
from ..rewrites.last_layer import NAME as LAST_LAYER
from ..rewrites.last_layer import language_layers
from ..rewrites.row_attention import NAME as ROW_ATTENTION
from ..rewrites.row_attention import attend_outside_of_graphs

log = logging.getLogger("mmft")

COMPILERS = ("torch._dynamo", "torch._inductor")  # modules of the errors that say that something cannot be compiled
BACKENDS = ("inductor", "aot_eager", "eager")  # of torch.compile; the last two trace the layers and need no compiler
MODES = ("default", "max-autotune-no-cudagraphs")  # of torch.compile; the others record CUDA graphs, which was not tested
LIMIT_LOGGER = "torch._dynamo.convert_frame"  # says when a function was compiled too often


@dataclass(frozen=True)
class Compile:
    """Arguments of torch.compile. dynamic: whether numbers of rows and tokens are variables; training always wants that."""

    backend: str
    mode: str | None
    dynamic: bool = True


def wanted_compile(trainer: Section) -> Compile | None:
    """What the keys of the section `trainer` ask for, read as transformers reads them: a backend or a mode asks for compiling too. None: layers run as they are."""
    if not any(trainer.get(key) for key in COMPILE):
        return None
    return Compile(trainer.get("torch_compile_backend") or "inductor", trainer.get("torch_compile_mode"))


def check_compile(settings: Settings) -> None:
    """Raises UserError for an unknown backend or mode, and for settings that compiled layers were not tested with."""
    trainer, lora = settings["trainer"], settings["lora"]
    if (wanted := wanted_compile(trainer)) is None:
        return
    if (key := sharded_by(trainer)) is not None:
        raise UserError(f"trainer.{key}: takes the layers apart that trainer.torch_compile=true would compile; leave out one of the two")
    if (bits := next((key for key in ("load_in_8bit", "load_in_4bit") if (settings["model"].get("quantization") or {}).get(key)), None)) is not None:
        raise UserError(f"trainer.torch_compile=true: was not tested with model.quantization.{bits}; leave out one of the two")
    method = METHODS.get(str(lora.get("method") or "lora"))
    if lora.get("r") is not None and lora.get("lora_dropout") and method is not None and (method.config == "LoraConfig" or "lora_dropout" in method.keys):
        raise UserError(
            f"lora.lora_dropout={lora['lora_dropout']}: its masks are drawn between the operations that trainer.torch_compile=true would join,"
            " and each layer would fall into pieces; add lora.lora_dropout=0, or leave out trainer.torch_compile"
        )
    for key, value, known, why in (
        ("torch_compile_backend", wanted.backend, BACKENDS, ""), ("torch_compile_mode", wanted.mode, MODES, " (modes with CUDA graphs were not tested)"),
    ):  # fmt: skip
        if value is not None and value not in known:
            raise UserError(f"trainer.{key}={value}: must be one of {', '.join(known)}{why}.{nearest(value, known)}")
    if wanted.mode not in (None, "default") and wanted.backend != "inductor":
        raise UserError(f"trainer.torch_compile_mode={wanted.mode}: is a mode of inductor, and trainer.torch_compile_backend={wanted.backend} has none; leave out one of the two")


def check_compiler(wanted: Compile, device: torch.device, quantized: bool) -> None:
    """Compile a function of one line, before anything is measured or trained. Raises UserError where torch finds no compiler for the device, and for a base that is
    quantised, also by its own files.
    """
    if quantized:
        raise UserError("trainer.torch_compile=true: was not tested over a quantised base; leave it out, or use an unquantised base")
    _quieten()
    try:
        torch.compile(_probe, backend=wanted.backend, mode=wanted.mode)(torch.ones(4, device=device))
    except Exception as error:  # torch wraps what a compiler or its absence raises in errors of many kinds
        needed = "install a C++ compiler (g++)" if device.type == "cpu" else "it needs Triton, which comes with torch for Linux"
        raise UserError(f"trainer.torch_compile=true: torch cannot compile for {device.type} here: {_reason(error)}; {needed}, or leave it out") from None


def _probe(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2


def compile_layers(model: torch.nn.Module, replaced: Replaced, wanted: Compile) -> int:
    """Let the layers of the language model compute by compiled functions while gradients are wanted; returns how many.

    model: with its adapter, or of jointly trained points. replaced: its rewrites. Of several layers a last one that computes only the positions that are read
    stays as it is: its graph would be another, for a small part of the work. Raises UserError for a model without such layers, and for one that drops values
    itself.
    """
    layers = language_layers(model.get_base_model() if hasattr(model, "get_base_model") else model)
    if not layers:
        raise UserError("trainer.torch_compile=true: mmft finds no layers of a language model in this model; leave it out")
    if (name := _live_dropout(model, layers)) is not None:
        raise UserError(f"trainer.torch_compile=true: {name} of this model drops values in training, and a compiled layer would drop others; set it to 0 in the model's config.json, or leave out torch_compile")
    if LAST_LAYER in replaced.classes and len(layers) > 1:
        layers = layers[:-1]
    torch.compiler.reset()  # what an earlier run of this process has compiled would count against torch's limit
    keep_graphs_whole()
    if ROW_ATTENTION in replaced.classes:
        attend_outside_of_graphs()
    for layer in layers:
        replaced.set(layer, _while_training(layer.forward, torch.compile(layer.forward, backend=wanted.backend, mode=wanted.mode, dynamic=wanted.dynamic)))
    return len(layers)


def why_not_compiled(error: BaseException) -> str | None:
    """What torch says about a layer that it could not compile; None for any other error."""
    if any(kind.__module__.startswith(COMPILERS) for kind in type(error).__mro__):
        return _reason(error)
    return None


def _while_training(whole: Callable[..., Any], compiled: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else whole)(*args, **kwargs)

    return forward


def _live_dropout(model: torch.nn.Module, layers: list[Any]) -> str | None:
    """A module or a value of the layers that drops values in training. Frozen modules do not (adapters/freeze.py)."""
    was_training = model.training
    model.train()
    try:
        for module in (m for layer in layers for m in layer.modules() if m.training):
            if isinstance(module, torch.nn.Dropout) and module.p > 0:
                return f"Dropout(p={module.p})"
            for name in FUNCTIONAL_DROPOUT:
                if isinstance(value := getattr(module, name, None), float) and value > 0:
                    return f"{name}={value}"
    finally:
        model.train(was_training)
    return None


def _reason(error: BaseException) -> str:
    """The first line of what is behind an error of the compiler."""
    inner = getattr(error, "inner_exception", None) or error
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    return (lines or [type(inner).__name__])[0][:200]


def _quieten() -> None:
    """torch's compilers say much that is no mistake, such as that there is no GPU. TORCH_LOGS, which asks them to speak, is obeyed."""
    if os.environ.get("TORCH_LOGS"):
        return
    for name in ("torch._dynamo", "torch._inductor", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\._(dynamo|inductor|functorch)")
    limit = logging.getLogger(LIMIT_LOGGER)
    limit.setLevel(logging.WARNING)
    limit.propagate = False
    limit.handlers = [_Limit()]


class _Limit(logging.Handler):
    """One line where a layer has had to be compiled so often that torch gives up and runs the rest as it is."""

    said = False

    def emit(self, record: logging.LogRecord) -> None:
        if "recompile_limit" in record.getMessage() and not self.said:
            self.said = True
            log.warning("%-14s torch has compiled the layers as often as it does, and runs some batches as they are; TORCH_LOGS=recompiles says why", "compile")
