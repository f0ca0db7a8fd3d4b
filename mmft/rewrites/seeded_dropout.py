"""Dropout whose masks are a function of (seed, step, micro-batch, layer), however a run is stopped, joined or recomputed."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import torch
import torch.nn.functional as F

from ..system.distributed import rank
from .last_layer import ReadPositions

LEVELS = 65536  # p is rounded to 16 bits, and kept values are divided by exactly the share that is kept


class DropoutStream:
    """The random numbers of all dropout layers of one adapter: the seed, and the point that training has reached.

    Masks need no saved random state when a run is resumed, a layer that activation checkpointing computes twice drops the same
    values twice, and jointly trained adapters draw what each would have drawn alone.
    """

    def __init__(self, seed: int):
        self.seed = seed
        self.step, self.micro_batch = 0, 0
        # (rows, longest row) of the micro-batches that one batch was merged from: each gets the masks it would have got alone
        self.merged: list[tuple[int, int]] = []
        # of a batch whose rows lie end to end without padding: the place of each position in its padded micro-batches, laid end to end
        self.packed: torch.Tensor | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def advance(self, step: int, micro_batch: int, merged: list[tuple[int, int]], packed: torch.Tensor | None = None) -> None:
        """Set the point that training has reached, before each forward pass. packed: with the micro-batches in `merged`."""
        self.step, self.micro_batch, self.merged, self.packed = step, micro_batch, merged, packed

    @property
    def point(self) -> tuple[object, ...]:
        """Equal for streams that draw the same masks now."""
        packed = b"" if self.packed is None else self.packed.cpu().numpy().tobytes()
        return self.seed, self.step, self.micro_batch, packed, *self.merged

    def mask(self, layer: int, rows: int, length: int, width: int, device: torch.device, dropped: int) -> torch.Tensor:
        """(rows x length, width), True where a value is kept; `dropped` of LEVELS are not."""
        parts = self.merged or [(rows, length)]
        masks = [self.draw(layer, number, torch.Size((n, longest, width)), device, dropped) for number, (n, longest) in enumerate(parts)]
        if self.packed is not None:  # a row drops what it would drop without packing
            return torch.cat([m.view(-1, width) for m in masks]).index_select(0, self.packed.to(device))
        if self.merged:
            masks = [torch.cat([F.pad(m, (0, 0, 0, length - m.shape[1]), value=True) for m in masks])]
        return masks[0].view(-1, width)

    def layout(self, x: torch.Tensor) -> tuple[int, int]:
        """(rows, positions of each row) of x (rows, positions, d); some layers see both in one dimension."""
        count = x.numel() // x.shape[-1]
        rows = sum(n for n, _ in self.merged) if self.merged and self.packed is None else x.shape[0] if x.dim() > 2 else 1
        return rows, count // rows

    def key(self, layer: int, number: int) -> int:
        """The seed of one layer's mask for one micro-batch of this step; the processes of one training draw different masks."""
        packed = struct.pack("<5q", self.seed, self.step, self.micro_batch + number, layer, rank())
        return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1

    def draw(self, layer: int, number: int, shape: torch.Size, device: torch.device, dropped: int) -> torch.Tensor:
        """The mask of one micro-batch, of `shape`.

        On the CPU numpy's SFC64 draws it, four values at a time, and numpy compares: torch's generator and its comparison of 16-bit
        numbers take several times as long there.
        """
        if device.type == "cpu":
            values = np.random.SFC64(self.key(layer, number)).random_raw(-(-shape.numel() // 4)).view(np.int16)[: shape.numel()]
            return torch.from_numpy(values >= dropped - LEVELS // 2).view(shape)
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        generator = self._generators[device].manual_seed(self.key(layer, number))
        return torch.randint(LEVELS, shape, generator=generator, device=device, dtype=torch.int32) >= dropped


class SeededDropout(torch.nn.Module):
    """torch.nn.Dropout with masks of a DropoutStream: each value is 0 with probability `p`, else divided by 1 - p."""

    def __init__(self, p: float, stream: DropoutStream, layer: int):
        super().__init__()
        self.p, self.stream, self.layer = p, stream, layer
        self.dropped = round(p * LEVELS)
        self.positions: ReadPositions | None = None  # of a layer that computes only the positions that are read

    def is_on(self) -> bool:
        return self.training and self.dropped > 0

    @property
    def factor(self) -> float:
        """What a kept value is multiplied by."""
        return LEVELS / max(LEVELS - self.dropped, 1)

    def kept(self, x: torch.Tensor) -> torch.Tensor | None:
        """True where a value of x is kept, in its shape; None where all are. A narrowed x gets its part of the whole mask."""
        if not self.is_on():
            return None
        if self.positions is None or self.positions.index is None:
            rows, length = self.stream.layout(x)
            return self.stream.mask(self.layer, rows, length, x.shape[-1], x.device, self.dropped).view(x.shape)
        rows, length = self.positions.shape
        return self.positions.select(self.stream.mask(self.layer, rows, length, x.shape[-1], x.device, self.dropped))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = self.kept(x)
        return x if kept is None else (x * ones_and_zeros(kept, x.dtype)).mul_(self.factor)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def ones_and_zeros(kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as numbers of a dtype. On the CPU torch.where and the cast of a bool take five times as long."""
    return kept.view(torch.uint8).to(dtype)


def seed_dropout(model: torch.nn.Module, seed: int) -> DropoutStream:
    """Give the dropout of every LoRA or VeRA layer of a PeftModel masks from one stream; layers are numbered in the model's order."""
    from peft.tuners.lora import LoraLayer
    from peft.tuners.vera.layer import VeraLayer

    stream = DropoutStream(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, (LoraLayer, VeraLayer))]
    for number, layer in enumerate(layers):
        dropouts = layer.lora_dropout if isinstance(layer, LoraLayer) else layer.vera_dropout
        for name, dropout in dropouts.items():
            if isinstance(dropout, torch.nn.Dropout):
                dropouts[name] = SeededDropout(dropout.p, stream, number)
    return stream
