"""A small model with its adapter attached and its training rewrites applied, as mmft trains it; and a batch of two rows."""

from __future__ import annotations

from typing import Any, NamedTuple

LANGUAGE = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "scope": "language"}


class Adapted(NamedTuple):
    model: Any
    collator: Any
    rewrites: Any


def adapted(small: Any, kind: str, dtype: str = "fp32", seed: int = 0, **settings: Any) -> Adapted:
    """The model of a kind with random matrices B, so that the adapter changes the output. settings: of LoraConfig, and `scope`."""
    import torch

    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.plan import plan_adapter
    from mmft.rewrites.apply import rewrite_for_training

    model, collator, _ = small.load(kind, dtype=dtype)
    torch.manual_seed(seed)
    model = attach_adapter(model, plan_adapter(model, {**LANGUAGE, **settings}))
    rewrites = rewrite_for_training(model, "auto", seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return Adapted(model, collator, rewrites)


def batch(small: Any, kind: str, collator: Any) -> dict[str, Any]:
    return collator([small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")])
