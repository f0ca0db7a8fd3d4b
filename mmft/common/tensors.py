"""Move batches between devices; switch a model to eval mode for a block."""

from __future__ import annotations

from typing import Any


class eval_mode:
    """`with eval_mode(model)`: eval mode inside, the former mode again behind it."""

    def __init__(self, model: Any):
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        if self.was_training:
            self.model.train()


def to_device(batch: dict[str, Any], device: Any) -> dict[str, Any]:
    """The batch with every tensor in it, also in nested ones, on `device`."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
