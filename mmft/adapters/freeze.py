"""Frozen parts stay frozen: eval mode (no dropout) while training, and no gradients through what lies before the adapter."""

from __future__ import annotations

import types
from typing import Any

from ..common.model_parts import part_of

# Images flow through the parts in this order; nothing before the first trained one needs a gradient.
FLOW = ("vision", "qformer", "connector", "language")
FUNCTIONAL_DROPOUT = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout")


def freeze(model: Any) -> list[str]:
    """Make `model.train()` switch only trained modules to training, and run wholly frozen parts without gradients.

    Gradient checkpointing makes frozen inputs require gradients (`enable_input_require_grads` hooks every embedding), and
    a frozen tower would then be recomputed and backpropagated; without gradients it cannot be.
    Returns the names of the modules that run without gradients.
    """
    modules = _trained_modules(model)
    flagged = _checkpointed_layers(model) if modules != [model] else []

    set_before: list[bool] = []

    def train(self: Any, mode: bool = True) -> Any:
        if mode and set_before and self.training:
            return self  # asked at every step
        set_before[:] = [mode]
        type(self).train(self, False)
        if mode:
            self.training = True
            for module in modules:
                type(module).train(module, True)
            for module in flagged:  # transformers checkpoints a layer only when the layer itself is in training mode
                module.training = True
        return self

    model.train = types.MethodType(train, model)
    for layer in flagged:
        for name in FUNCTIONAL_DROPOUT:
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)
    return _no_gradients(model)


def _trained_modules(model: Any) -> list[Any]:
    """The topmost modules all of whose parameters are trained, and the dropout of adapters, which has none."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: list[Any] = []

    def visit(module: Any) -> None:
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            found.append(module)
            return
        for name, child in module.named_children():
            if isinstance(module, BaseTunerLayer) and name != "base_layer":
                found.append(child)
            else:
                visit(child)

    visit(model)
    return found


def _checkpointed_layers(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and any(p.requires_grad for p in m.parameters())]


def frozen_parts(model: Any) -> set[str]:
    """The parts before the first trained one, in the order images flow through them."""
    trained = {part_of(n) for n, p in model.named_parameters() if p.requires_grad}
    if "other" in trained or not trained:
        return set()
    return set(FLOW[: min(FLOW.index(part) for part in trained)])


def _no_gradients(model: Any) -> list[str]:
    import torch

    frozen = frozen_parts(model)
    wrapped: list[str] = []

    def visit(name: str, module: Any) -> None:
        parts = {part_of(f"{name}.{n}") for n, _ in module.named_parameters()}
        if not parts:
            return
        callable_ = type(module).forward is not torch.nn.Module.forward and not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
        if parts <= frozen and callable_:
            module.forward = torch.no_grad()(module.forward)
            wrapped.append(name)
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    if frozen:
        visit("", model)
    return wrapped


