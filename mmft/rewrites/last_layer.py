"""The last layer computes only the positions whose output is read: those that predict a supervised token.

Behind the last layer's attention nothing mixes positions any more, and the head reads the supervised ones alone
(`logits_to_keep`). So that layer's queries, its output projection and its MLP are computed there and nowhere else; keys and
values are for all, since the supervised positions look at the others. Losses and gradients are those of the whole layer.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..common.model_parts import part_of

log = logging.getLogger("mmft")

# What works position by position, by transformers' names; an MLP only where it is made of linear layers and an activation.
BY_POSITION = ("q_proj", "o_proj", "out_proj", "fc1", "fc2")
CLOSE = 1e-3  # of the largest logit: more of a difference than rounding makes


class Places:
    """Which positions are read in the forward pass that is on its way, or was last; all where `index` is None.

    index: (n,) numbers of positions of the batch laid end to end; `shape`: (B, S). Activation checkpointing computes layers
    again in the backward pass: the next forward pass of the model, and nothing else, changes these.
    """

    def __init__(self) -> None:
        self.on = True  # off: all positions, whatever is read
        self.index: torch.Tensor | None = None
        self.shape: tuple[int, int] = (0, 0)

    def begin(self, keep: Any) -> None:
        self.index, self.shape = None, (0, 0)
        if self.on and isinstance(keep, torch.Tensor) and keep.dtype == torch.bool and keep.dim() == 2:
            self.index, self.shape = keep.flatten().nonzero().squeeze(1), tuple(keep.shape)

    def read(self, x: torch.Tensor) -> torch.Tensor:
        """(B, S, d) or (B x S, d) -> (n, d)"""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.index)


def narrow(model: Any) -> Places | None:
    """Make the last layer of a model's language part compute what is read; None where nothing could be told apart.

    model: with its adapter attached, or the modules that serve several (mmft/joint/stacked_model.py).
    """
    top = model.get_base_model() if hasattr(model, "get_base_model") else model
    found = _by_position(top)
    if not found:
        return None
    places = Places()
    for door in _doors(top):
        door.forward = _beginning(door.forward, places)
    for module in found:
        module.forward = _where_read(module.forward, places)
        for inner in module.modules():
            if hasattr(inner, "places"):  # dropout (mmft/adapters/seeded_dropout.py) and layers of several adapters draw masks for all positions
                inner.places = places
    return places


def checked(model: Any, batch: dict[str, Any], once: Callable[[Callable[[], bool]], bool] = lambda compare: compare()) -> Places | None:
    """`narrow`, and the logits of one batch with and without it compared; a model that gives others is left whole.

    once: calls the comparison, or knows what it gave for another adapter of the same layers.
    """
    from ..losses.supervised import takes_logits_to_keep

    places = narrow(model) if takes_logits_to_keep(model) else None
    if places is None:
        return None
    places.on = once(lambda: _gives_the_same(model, places, batch))
    if places.on:
        return places
    log.info("%-14s computed whole: this model gives other logits otherwise", "last layer")
    return None


def _gives_the_same(model: Any, places: Places, batch: dict[str, Any]) -> bool:
    from ..common.tensors import eval_mode
    from ..losses.supervised import supervised_logits

    logits = {}
    with torch.no_grad(), eval_mode(model):
        for places.on in (True, False):
            logits[places.on] = supervised_logits(model, batch)[0]
    return bool((logits[True] - logits[False]).abs().max() <= CLOSE * logits[False].abs().max())


def _doors(top: Any) -> list[Any]:
    """Where a forward pass begins: the model, and a language model in it that generates by itself (BLIP-2's)."""
    from transformers import GenerationMixin

    return [m for m in top.modules() if isinstance(m, GenerationMixin)]


def _beginning(whole: Any, places: Places) -> Any:
    @functools.wraps(whole)
    def forward(*args: Any, **kwargs: Any) -> Any:
        places.begin(kwargs.get("logits_to_keep"))
        return whole(*args, **kwargs)

    return forward


def _by_position(top: Any) -> list[Any]:
    """The modules of the last layer that need only the positions that are read."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for n, m in top.named_modules() if isinstance(m, GradientCheckpointingLayer) and part_of(n) == "language"]
    if not layers:
        return []
    found: list[Any] = []

    def visit(module: Any) -> None:
        for name, child in module.named_children():
            if name in BY_POSITION or name == "mlp" and dense(child):
                found.append(child)
            elif not hasattr(child, "base_layer"):
                visit(child)

    visit(layers[-1])
    return found


def dense(mlp: Any) -> bool:
    """Whether it is linear layers (adapted or not) and an activation, with no router or table of experts."""
    from transformers.activations import ACT2CLS

    activations = tuple({c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values()})
    return all(
        isinstance(child, (torch.nn.Linear, torch.nn.Dropout, *activations)) or hasattr(child, "base_layer") for child in mlp.children()
    ) and not list(mlp.parameters(recurse=False))


def _where_read(whole: Any, places: Places) -> Any:
    @functools.wraps(whole)
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if places.index is None:
            return whole(x, *args, **kwargs)
        y = whole(places.read(x), *args, **kwargs)
        return y.new_zeros(x.numel() // x.shape[-1], y.shape[-1]).index_copy(0, places.index, y).view(*x.shape[:-1], -1)

    return forward
