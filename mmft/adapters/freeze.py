"""Keep frozen parts frozen: eval mode (no dropout) during training, and no gradients through parts before the adapter."""

from __future__ import annotations

import types
from typing import Any

from ..common.model_parts import part_of

# Images flow through the parts in this order; nothing before the first trained part needs a gradient.
FLOW = ("audio", "vision", "qformer", "connector", "language")
FUNCTIONAL_DROPOUT = ("dropout", "attention_dropout", "activation_dropout", "hidden_dropout")


def freeze(model: Any, noisy_embeddings: bool = False) -> list[str]:
    """Let `model.train()` switch only trained modules to training, and run fully frozen parts without gradients.

    Gradient checkpointing makes frozen inputs require gradients (`enable_input_require_grads` hooks every embedding). A frozen tower
    would then be recomputed and backpropagated; without gradients it is not. noisy_embeddings: set the frozen input embeddings to training,
    too, because NEFTune adds noise only in training mode. Returns the names of the modules that run without gradients.
    """
    modules = _trained_modules(model)
    if noisy_embeddings and modules != [model]:
        modules.append(model.get_input_embeddings())
    checkpointed = _checkpointed_layers(model) if modules != [model] else []
    modes: list[bool] = []  # the mode that was set last

    def train(self: Any, mode: bool = True) -> Any:
        if mode and modes and self.training:
            return self  # the Trainer calls this at every step
        modes[:] = [mode]
        type(self).train(self, False)
        if mode:
            self.training = True
            for module in modules:
                type(module).train(module, True)
            for layer in checkpointed:  # transformers checkpoints a layer only if the layer itself is in training mode
                layer.training = True
        return self

    model.train = types.MethodType(train, model)
    for layer in checkpointed:
        for name in FUNCTIONAL_DROPOUT:
            if isinstance(getattr(layer, name, None), float):
                setattr(layer, name, 0.0)
    return _without_gradients(model)


def _trained_modules(model: Any) -> list[Any]:
    """The topmost modules whose parameters are all trained, and the dropout of adapters, which has no parameters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    trained: list[Any] = []

    def visit(module: Any) -> None:
        parameters = list(module.parameters())
        if parameters and all(p.requires_grad for p in parameters):
            trained.append(module)
            return
        for name, child in module.named_children():
            if isinstance(module, BaseTunerLayer) and name != "base_layer":
                trained.append(child)
            else:
                visit(child)

    visit(model)
    return trained


def _checkpointed_layers(model: Any) -> list[Any]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer) and any(p.requires_grad for p in m.parameters())]


def frozen_parts(model: Any) -> set[str]:
    """The parts before the first trained one, in the order of FLOW."""
    trained = {part_of(n) for n, p in model.named_parameters() if p.requires_grad}
    if "other" in trained or not trained:
        return set()
    return set(FLOW[: min(FLOW.index(part) for part in trained)])


def _without_gradients(model: Any) -> list[str]:
    import torch

    frozen = frozen_parts(model)
    wrapped: list[str] = []

    def visit(name: str, module: Any) -> None:
        parts = {part_of(f"{name}.{n}") for n, _ in module.named_parameters()}
        if not parts:
            return
        has_forward = type(module).forward is not torch.nn.Module.forward and not isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict))
        if parts <= frozen and has_forward:
            module.forward = torch.no_grad()(module.forward)
            wrapped.append(name)
            return
        for child_name, child in module.named_children():
            visit(f"{name}.{child_name}" if name else child_name, child)

    if frozen:
        visit("", model)
    return wrapped
