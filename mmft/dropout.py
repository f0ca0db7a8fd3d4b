"""Dropout whose masks are a function of (seed, step, micro-batch, layer): the same however a run is stopped, joined or recomputed."""

from __future__ import annotations

import hashlib
import struct
from typing import Any

import torch

from .distributed import rank


class Stream:
    """What the dropout layers of one adapter share: the seed, and where training stands (`at`, set by the trainer).

    Masks need no saved random state to go on after a stop, a layer that activation checkpointing computes twice drops the
    same values twice, and adapters that are trained side by side draw what each would have drawn alone.
    """

    def __init__(self, seed: int):
        self.seed, self.at = seed, (0, 0)
        self._generators: dict[Any, torch.Generator] = {}

    def generator(self, layer: int, device: torch.device) -> torch.Generator:
        """A generator on `device` at the start of this layer's draws for this step; processes of one training draw apart."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        drawn = hashlib.blake2b(struct.pack("<5q", self.seed, *self.at, layer, rank()), digest_size=8).digest()
        return self._generators[device].manual_seed(int.from_bytes(drawn, "little") >> 1)


class SeededDropout(torch.nn.Module):
    """torch.nn.Dropout, drawn from a Stream: each value is 0 with probability `p`, else divided by 1 - p."""

    def __init__(self, p: float, stream: Stream, layer: int):
        super().__init__()
        self.p, self.stream, self.layer = p, stream, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.p == 0.0:
            return x
        kept = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=self.stream.generator(self.layer, x.device))
        return x * kept.div_(1.0 - self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"


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
