"""Keys and values of rows from several batches in one: shorter rows get zeros on the left, further tokens find room on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

ROOM = 32  # columns by which a layer's buffers grow
JOINABLE = (DynamicLayer, DynamicSlidingWindowLayer)  # exactly these layers can be joined, subclasses may hold more


def joined_layer(parts: Sequence[tuple[Any, torch.Tensor]], width: int) -> DynamicLayer:
    """One layer's keys and values of the chosen rows of several batches, their last `width` columns."""
    window = getattr(parts[0][0], "sliding_window", None)
    columns = width if window is None else min(width, window - 1)
    # layers may lie on several devices
    keys, values = (torch.cat([aligned(getattr(layer, name)[chosen.to(layer.keys.device)], columns, -2) for layer, chosen in parts]) for name in ("keys", "values"))
    if window is None:
        return GrowingLayer(keys, values)
    sliding = DynamicSlidingWindowLayer(sliding_window=window)
    sliding.update(keys, values)
    sliding.cumulative_length = width
    return sliding


def aligned(tensor: torch.Tensor, width: int, dim: int) -> torch.Tensor:
    """The last `width` entries along `dim`; missing ones are zeros on the left."""
    have = tensor.shape[dim]
    if have >= width:
        return tensor.narrow(dim, have - width, width)
    shape = list(tensor.shape)
    shape[dim] = width - have
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)


class GrowingLayer(DynamicLayer):
    """Keys and values (B, heads, S, width) in buffers with room for further tokens: a step writes one column and copies nothing else."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.lazy_initialization(keys, values)
        self.buffers = [keys, values]
        self.keys, self.values = keys, values
        self.length = keys.shape[-2]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        stop = self.length + key_states.shape[-2]
        for n, states in enumerate((key_states, value_states)):
            if stop > self.buffers[n].shape[-2]:
                room = states.new_empty(*states.shape[:2], stop - self.length + ROOM, states.shape[-1])
                self.buffers[n] = torch.cat([self.buffers[n][:, :, : self.length], room], dim=-2)
            self.buffers[n][:, :, self.length : stop] = states
        self.length = stop
        self.keys, self.values = (buffer[:, :, :stop] for buffer in self.buffers)
        return self.keys, self.values
