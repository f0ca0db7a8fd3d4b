"""The last layer computes only the positions whose output is read: those that predict a supervised token.

After the attention of the last layer nothing mixes positions, and the head reads only the supervised ones (`logits_to_keep`). So the
queries, the output projection and the MLP of that layer are computed at these positions only. Keys and values are computed at all
positions, because the supervised ones attend to the others. Losses and gradients are those of the whole layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..common.model_parts import part_of
from ..common.tensors import eval_mode
from ..losses.supervised import supervised_logits, takes_logits_to_keep
from .base import Replaced

log = logging.getLogger("mmft")

NAME = "last_layer"
GAIN = "0.89 of a training step; CPU, fp32, 41 M Qwen2-VL, 4 rows, r 16 (python -m benchmarks.rewrites)"
# Layers that work position by position, by transformers' names; an MLP only if it consists of linear layers and an activation.
BY_POSITION = ("q_proj", "o_proj", "out_proj", "fc1", "fc2")
CLOSE = 1e-3  # of the largest logit: more of a difference than rounding makes


class ReadPositions:
    """Positions whose output the loss needs in the current (or latest) forward pass; all positions if `index` is None.

    index: (n,) numbers of positions of the batch laid end to end; `shape`: (B, S). Activation checkpointing computes layers again in the
    backward pass, so only the next forward pass of the whole model changes these.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.index: torch.Tensor | None = None
        self.shape: tuple[int, int] = (0, 0)

    def begin_forward(self, logits_to_keep: object) -> None:
        self.index, self.shape = None, (0, 0)
        if self.enabled and isinstance(logits_to_keep, torch.Tensor) and logits_to_keep.dtype == torch.bool and logits_to_keep.dim() == 2:
            self.index = logits_to_keep.flatten().nonzero().squeeze(1)
            self.shape = (logits_to_keep.shape[0], logits_to_keep.shape[1])

    def select(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) or (B x S, d) -> (n, d)"""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.index)


def narrow_last_layer(model: torch.nn.Module, replaced: Replaced) -> ReadPositions | None:
    """Let the last language layer compute only what is read; None if the model has no such layer.

    model: with its adapter attached, or the model of jointly trained points.
    """
    top = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules = _by_position(top)
    if not modules:
        return None
    positions = ReadPositions()
    for entry in _entry_points(top):
        replaced.set(entry, _note_positions(entry.forward, positions))
    for module in modules:
        replaced.set(module, _at_positions(module.forward, positions))
        for inner in module.modules():
            if hasattr(inner, "positions"):  # dropout and layers of several adapters draw masks for all positions
                inner.positions = positions
    replaced.classes[NAME] = {type(m) for m in modules}
    return positions


def narrow_if_equal(
    model: torch.nn.Module, batch: dict[str, Any], replaced: Replaced, once: Callable[[Callable[[], bool]], bool] = lambda compare: compare()
) -> ReadPositions | None:
    """`narrow_last_layer`, if the logits of one batch are the same with and without it.

    once: calls the comparison, or returns its earlier result for another adapter over the same layers. None: the model computes its
    last layer whole.
    """
    positions = narrow_last_layer(model, replaced) if takes_logits_to_keep(model) else None
    if positions is None:
        return None
    positions.enabled = once(lambda: _gives_same_logits(model, positions, batch))
    if positions.enabled:
        return positions
    log.info("%-14s computed at all positions: this model gives other logits otherwise", "last layer")
    return None


def _gives_same_logits(model: torch.nn.Module, positions: ReadPositions, batch: dict[str, Any]) -> bool:
    logits = {}
    with torch.no_grad(), eval_mode(model):
        for positions.enabled in (True, False):
            logits[positions.enabled] = supervised_logits(model, batch)[0]
    return bool((logits[True] - logits[False]).abs().max() <= CLOSE * logits[False].abs().max())


def _entry_points(top: torch.nn.Module) -> Iterator[Any]:
    """Where a forward pass begins: the model, and a language model in it that generates by itself (BLIP-2's)."""
    from transformers import GenerationMixin

    return (m for m in top.modules() if isinstance(m, GenerationMixin))


def _note_positions(whole: Callable[..., Any], positions: ReadPositions) -> Callable[..., Any]:
    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        positions.begin_forward(kwargs.get("logits_to_keep"))
        return whole(*args, **kwargs)

    return forward


def language_layers(top: torch.nn.Module) -> list[Any]:
    """The layers of the language model, in order, without an adapter's wrapper around the model."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for n, m in top.named_modules() if isinstance(m, GradientCheckpointingLayer) and part_of(n) == "language"]


def _by_position(top: torch.nn.Module) -> list[torch.nn.Module]:
    """The modules of the last layer that need only the positions that are read."""
    layers = language_layers(top)
    if not layers:
        return []
    selected: list[torch.nn.Module] = []

    def visit(module: torch.nn.Module) -> None:
        for name, child in module.named_children():
            if name in BY_POSITION or name == "mlp" and is_dense(child):
                selected.append(child)
            elif not hasattr(child, "base_layer"):
                visit(child)

    visit(layers[-1])
    return selected


def is_dense(mlp: torch.nn.Module) -> bool:
    """Whether an MLP consists of linear layers (adapted or not) and an activation, without a router or a table of experts."""
    from transformers.activations import ACT2CLS

    activations = tuple({c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()})
    return all(
        isinstance(child, (torch.nn.Linear, torch.nn.Dropout, *activations)) or hasattr(child, "base_layer") for child in mlp.children()
    ) and not list(mlp.parameters(recurse=False))


def _at_positions(whole: Callable[..., torch.Tensor], positions: ReadPositions) -> Callable[..., torch.Tensor]:
    @functools.wraps(whole)
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if positions.index is None:
            return whole(x, *args, **kwargs)
        y = whole(positions.select(x), *args, **kwargs)
        return y.new_zeros(x.numel() // x.shape[-1], y.shape[-1]).index_copy(0, positions.index, y).view(*x.shape[:-1], -1)

    return forward
