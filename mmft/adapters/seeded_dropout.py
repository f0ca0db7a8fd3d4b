"""Dropout whose masks are a function of (seed, step, micro-batch, layer): the same however a run is stopped, joined or recomputed."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..system.distributed import rank

LEVELS = 65536  # p is rounded to 16 bits, and what is kept is divided by exactly the share that is kept


class Stream:
    """What the dropout layers of one adapter share: the seed, and where training stands (`at`, set by the trainer).

    Masks need no saved random state to go on after a stop, a layer that activation checkpointing computes twice drops the
    same values twice, and adapters that are trained side by side draw what each would have drawn alone.
    """

    def __init__(self, seed: int):
        self.seed, self.at = seed, (0, 0)
        # (rows, longest row) of the micro-batches that a batch was folded from: each gets the masks it would have got alone
        self.parts: list[tuple[int, int]] = []
        self._generators: dict[Any, torch.Generator] = {}

    def mask(self, layer: int, rows: int, length: int, width: int, device: torch.device, dropped: int) -> torch.Tensor:
        """(rows x length, width), True where a value stays; `dropped` of LEVELS do not."""
        parts = self.parts or [(rows, length)]
        masks = [self.drawn(layer, micro, torch.Size((n, own, width)), device, dropped) for micro, (n, own) in enumerate(parts)]
        if self.parts:
            masks = [torch.cat([F.pad(m, (0, 0, 0, length - m.shape[1]), value=True) for m in masks])]
        return masks[0].view(-1, width)

    def laid_out(self, x: torch.Tensor) -> tuple[int, int]:
        """(rows, positions of each) of x (rows, positions, d); some layers see both in one dimension."""
        count = x.numel() // x.shape[-1]
        rows = sum(n for n, _ in self.parts) if self.parts else x.shape[0] if x.dim() > 2 else 1
        return rows, count // rows

    def key(self, layer: int, micro: int) -> int:
        """The seed of this layer's draws for a micro-batch of this step; processes of one training draw apart."""
        step, first = self.at
        drawn = hashlib.blake2b(struct.pack("<5q", self.seed, step, first + micro, layer, rank()), digest_size=8).digest()
        return int.from_bytes(drawn, "little") >> 1

    def drawn(self, layer: int, micro: int, shape: torch.Size, device: torch.device, dropped: int) -> torch.Tensor:
        """The mask of one micro-batch, of `shape`.

        On the CPU from numpy's SFC64, four to a draw, and compared by numpy: torch's generator and its comparison of 16-bit numbers
        take several times as long there.
        """
        if device.type == "cpu":
            drawn = np.random.SFC64(self.key(layer, micro)).random_raw(-(-shape.numel() // 4)).view(np.int16)[: shape.numel()]
            return torch.from_numpy(drawn >= dropped - LEVELS // 2).view(shape)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        generator = self._generators[device].manual_seed(self.key(layer, micro))
        return torch.randint(LEVELS, shape, generator=generator, device=device, dtype=torch.int32) >= dropped


class SeededDropout(torch.nn.Module):
    """torch.nn.Dropout, drawn from a Stream: each value is 0 with probability `p`, else divided by 1 - p."""

    def __init__(self, p: float, stream: Stream, layer: int):
        super().__init__()
        self.p, self.stream, self.layer = p, stream, layer
        self.dropped = round(p * LEVELS)
        self.places: Any = None  # of a layer that computes only some positions (mmft/rewrites/last_layer.py)

    def on(self) -> bool:
        return self.training and self.dropped > 0

    @property
    def factor(self) -> float:
        """What a value that stays is multiplied by."""
        return LEVELS / max(LEVELS - self.dropped, 1)

    def kept(self, x: torch.Tensor) -> torch.Tensor | None:
        """True where a value of x stays, in its shape; None where all do. Of x that is narrowed, what the whole would have got."""
        if not self.on():
            return None
        if self.places is None or self.places.index is None:
            rows, length = self.stream.laid_out(x)
            return self.stream.mask(self.layer, rows, length, x.shape[-1], x.device, self.dropped).view(x.shape)
        rows, length = self.places.shape
        return self.places.read(self.stream.mask(self.layer, rows, length, x.shape[-1], x.device, self.dropped))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept(x)
        return x if kept is None else (x * ones_and_zeros(kept, x.dtype)).mul_(self.factor)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def ones_and_zeros(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What x is multiplied by to have zeros where `kept` (bool) is False.

    On the CPU torch's `where` looks at one value at a time and takes five times as long, and so does its cast of a bool.
    """
    return kept.view(torch.uint8).to(dtype)


def seed_dropout(model: Any, seed: int) -> Stream:
    """Give the dropout of every LoRA layer of a PeftModel masks of its own; the layers are numbered in the model's order."""
    from peft.tuners.lora import LoraLayer

    stream = Stream(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    for number, layer in enumerate(layers):
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, torch.nn.Dropout):
                layer.lora_dropout[name] = SeededDropout(dropout.p, stream, number)
    return stream
