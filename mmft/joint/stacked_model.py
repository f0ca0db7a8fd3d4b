"""The carrier: one more set of modules over the shared base weights, whose adapted layers serve the rows of every member."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..adapters.freeze import freeze
from ..adapters.seeded_dropout import SeededDropout, ones_and_zeros
from ..collators.base import IGNORE
from ..losses.supervised import supervised_logits
from ..rewrites import gated_mlp, rms_norm
from ..rewrites.last_layer import narrow
from ..rewrites.lora_linear import Part, Product, Share, one_dtype
from ..sweeps.shared_base import modules_over

PREFIX = "base_model.model."  # of module names in a PeftModel


@dataclass
class Rows:
    """Whose rows stand where in the batch that is on its way.

    of: (member's number, how many rows, how long they are), in order. read: supervised positions of each, in the same order,
    which is what a narrowed layer sees (mmft/rewrites/last_layer.py).
    """

    of: list[tuple[int, int, int]] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    copies: int = 1  # how often the first member's batch stands there, where all members have the same one

    def sizes(self, length: int) -> list[int]:
        """Entries of each member among `length` of all, rows x positions."""
        total = sum(n for _, n, _ in self.of)
        if length % total:
            raise RuntimeError(f"a layer got {length} entries for {total} rows; the members' rows cannot be told apart in it")
        return [n * (length // total) for _, n, _ in self.of]


class JointLinear(torch.nn.Module):
    """A linear layer over the stacked rows of all members, and each member's adapter over its own rows (mmft/rewrites/lora_linear.py).

    W's product is one for all. The adapters are the members' own layers, not copies.
    """

    def __init__(self, base_layer: torch.nn.Module, rows: Rows):
        super().__init__()
        self.base_layer, self.rows = base_layer, rows
        self.members = torch.nn.ModuleDict()
        self.places: Any = None  # where this layer computes only some positions

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self._share(x)
        if not self._in_one(x):
            return self._apart(x, own.parts, own.adapters)
        return Product.apply(x.reshape(-1, x.shape[-1]), own.base, own.parts, *own.adapters).view(*x.shape[:-1], -1)

    def share(self, x: torch.Tensor) -> Share | None:
        """What it puts into a product for x, of which only shape, dtype and device are looked at; None where values are cast on the way."""
        return self._share(x) if self._in_one(x) else None  # asked first: what computes by itself draws its masks itself

    def _in_one(self, x: torch.Tensor) -> bool:
        trained = (p for layer in self.members.values() for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters()))
        return type(self.base_layer) is torch.nn.Linear and one_dtype(x, self.base_layer, *trained)

    def _share(self, x: torch.Tensor) -> Share:
        flat = x.reshape(-1, x.shape[-1])
        narrowed = self.places is not None and self.places.index is not None
        sizes = self.rows.read if narrowed else self.rows.sizes(flat.shape[0])
        own, start = Share(self.base_layer, [], []), 0
        drawn: dict[Any, torch.Tensor] = {}
        for position, size in enumerate(sizes):
            number = str(self.rows.of[position][0])
            if number in self.members:
                layer = self.members[number]
                (name,) = layer.active_adapters
                part = Part(start, start + size, layer.scaling[name])
                dropout = layer.lora_dropout[name]
                if isinstance(dropout, SeededDropout) and dropout.on():
                    part.kept, part.factor = self._kept(dropout, position, start, flat, narrowed, drawn), dropout.factor
                own.parts.append(part)
                own.adapters += [layer.lora_A[name].weight, layer.lora_B[name].weight]
            start += size
        return own

    def _kept(self, dropout: Any, position: int, start: int, x: torch.Tensor, narrowed: bool, drawn: dict[Any, torch.Tensor]) -> torch.Tensor:
        """The mask of one member's entries: drawn for its own batch, whose rows may be shorter than the longest of all; the rest is padding."""
        _, n, own = self.rows.of[position]
        length = self.places.shape[1] if narrowed else x.shape[0] // sum(n for _, n, _ in self.rows.of)
        stream = dropout.stream
        key = (stream.seed, stream.at, tuple(stream.parts), dropout.layer, dropout.dropped, n, own)
        if key not in drawn:  # points with one seed drop the same values
            mask = stream.mask(dropout.layer, n, own, x.shape[1], x.device, dropout.dropped)
            padded = mask if own == length else F.pad(mask.view(n, own, -1), (0, 0, 0, length - own), value=True)
            drawn[key] = padded.view(n * length, -1)
        if not narrowed:
            return drawn[key]
        first = sum(rows for _, rows, _ in self.rows.of[:position]) * length
        return drawn[key].index_select(0, self.places.index[start : start + self.rows.read[position]] - first)

    def _apart(self, x: torch.Tensor, parts: list[Part], weights: list[torch.Tensor]) -> torch.Tensor:
        """The same where values are cast on the way, as peft's `lora.Linear.forward` computes it for one adapter."""
        result = self.base_layer(x)
        flat, pieces, at = x.reshape(-1, x.shape[-1]), [], 0
        for part, a, b in zip(parts, weights[::2], weights[1::2]):
            own = part.of(flat)
            if part.kept is not None:
                own = own * ones_and_zeros(part.kept, own.dtype) * part.factor
            pieces += [flat.new_zeros(part.start - at, result.shape[-1]), F.linear(F.linear(own.to(a.dtype), a), b) * part.scaling]
            at = part.stop
        pieces.append(flat.new_zeros(flat.shape[0] - at, result.shape[-1]))
        return (result + torch.cat(pieces).view(result.shape)).to(result.dtype)


def carrier(base: Any, members: dict[int, Any], rows: Rows, checkpointing: dict[str, Any] | None) -> Any:
    """The base's modules anew, over the same weights, with the adapters of `members` (number -> PeftModel) in place.

    checkpointing: `gradient_checkpointing_kwargs`, or None without.
    """
    from peft.tuners.lora import LoraLayer

    model = modules_over(base)
    for number, member in members.items():
        for name, layer in member.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            name = name.removeprefix(PREFIX)
            place = model.get_submodule(name)
            if not isinstance(place, JointLinear):
                place = JointLinear(place, rows)
                model.set_submodule(name, place)
            place.members[str(number)] = layer
    gated_mlp.take(model, _common(members, "gated"), lambda layer, x: layer.share(x) if isinstance(layer, JointLinear) else gated_mlp.of_layer(layer, x))
    rms_norm.take(model, _common(members, "normed"))
    _positions_once(model, rows)
    freeze(model)
    if all(getattr(member, "places", None) is not None for member in members.values()):
        narrow(model)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def _positions_once(model: Any, rows: Rows) -> None:
    """Members with one batch have one table of positions: what the Qwen families work out row by row in Python is worked out for the first."""
    for module in model.modules():
        if callable(whole := getattr(module, "get_rope_index", None)):
            module.get_rope_index = functools.partial(_of_first, whole, rows)


def _of_first(whole: Any, rows: Rows, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`get_rope_index`: (positions (3, B, S), deltas (B, 1)) of tensors whose first dimension goes over the rows, or over their images."""

    def first(value: Any) -> Any:
        return value[: len(value) // rows.copies] if isinstance(value, torch.Tensor) else value

    positions, deltas = whole(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
    return positions.repeat(1, rows.copies, 1), deltas.repeat(rows.copies, 1)


def _common(members: dict[int, Any], kinds: str) -> set[type]:
    return set.intersection(*(set(getattr(member, kinds, ())) for member in members.values()))


def losses(model: Any, rows: Rows, batches: Sequence[tuple[int, dict[str, Any], float]]) -> list[tuple[Any, Any]]:
    """(sum of the loss over supervised tokens, their number) of each (member, batch, label smoothing), from one pass."""
    rows.of = [(member, *batch["input_ids"].shape) for member, batch, _ in batches]
    rows.read = [int((batch["labels"][:, 1:] != IGNORE).sum()) for _, batch, _ in batches]
    rows.copies = len(batches) if all(batch["input_ids"] is batches[0][1]["input_ids"] for _, batch, _ in batches) else 1
    logits, targets, keep = supervised_logits(model, stacked([batch for _, batch, _ in batches]))
    return [
        (F.cross_entropy(own.float(), wanted.to(own.device), reduction="sum", label_smoothing=smoothing), keep.new_tensor(n, dtype=torch.long))
        for own, wanted, n, (_, _, smoothing) in zip(logits.split(rows.read), targets.split(rows.read), rows.read, batches)
    ]


FILL = {"labels": IGNORE}  # what a row is filled up with to the longest; everything else ends in zeros, behind the attention mask


def stacked(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """Several batches as one, in order: rows of tokens filled up on the right, everything of images end to end."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch["input_ids"].shape[1] for batch in batches)
    first = batches[0]
    out: dict[str, Any] = {}
    for key, value in first.items():
        parts = [batch[key] for batch in batches]
        if value is None:
            out[key] = None
        elif key == "mm_encoder_outputs":
            out[key] = {kind: _joined([p[kind] for p in parts]) for kind in value}
        elif value.shape[:2] == first["input_ids"].shape:
            out[key] = torch.cat([F.pad(p, (0, length - p.shape[1]), value=FILL.get(key, 0)) for p in parts])
        else:
            out[key] = torch.cat(parts)
    return out


def _joined(outputs: list[Any]) -> Any:
    """The image features of several batches as those of one."""
    kind = type(outputs[0])
    pooled = [o.pooler_output for o in outputs]
    joined = kind(pooler_output=torch.cat(pooled) if isinstance(pooled[0], torch.Tensor) else tuple(f for part in pooled for f in part))
    if getattr(outputs[0], "deepstack_features", None):
        levels = zip(*(o.deepstack_features for o in outputs))
        joined["deepstack_features"] = [tuple(f for part in level for f in part) for level in levels]
    return joined
