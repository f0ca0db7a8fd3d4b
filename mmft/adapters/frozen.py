"""FrozenAdapter: the weights of an adapter as they were at one time, to which a model is switched back for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MARKS = (".lora_", "modules_to_save.", "trainable_tokens_")  # in the names of an adapter's parameters, as peft names them


@dataclass(frozen=True)
class FrozenAdapter:
    """tensors: by the names of the model's parameters."""

    tensors: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: Any) -> FrozenAdapter:
        """A copy of the adapter that a PeftModel has now."""
        return cls({name: p.detach().clone() for name, p in model.named_parameters() if any(mark in name for mark in MARKS)})

    def restore(self, model: Any) -> None:
        """Give the model these weights, in place."""
        import torch

        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                parameters[name].copy_(tensor)

    @contextmanager
    def switched(self, model: Any) -> Iterator[None]:
        """The model has these weights inside the block, and its own ones afterwards, bit for bit."""
        own = FrozenAdapter.of(model)
        self.restore(model)
        try:
            yield
        finally:
            own.restore(model)
