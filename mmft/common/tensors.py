"""Move batches between devices; switch a model to eval mode for a block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class eval_mode:
    """`with eval_mode(model)`: eval mode inside the block, the earlier mode afterwards."""

    def __init__(self, model: torch.nn.Module):
        self.model = model

    def __enter__(self) -> None:
        self.was_training = self.model.training
        self.model.eval()

    def __exit__(self, *_: Any) -> None:
        if self.was_training:
            self.model.train()


def to_device(batch: dict[str, Any], device: torch.device | str) -> dict[str, Any]:
    """The batch with all its tensors, nested ones too, on `device`."""
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
