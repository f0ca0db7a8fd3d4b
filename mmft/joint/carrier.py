"""The carrier: one more set of modules over the shared base weights, whose adapted layers serve the rows of every member."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from ..freeze import freeze
from ..objective import supervised_logits
from ..shared import modules_over

PREFIX = "base_model.model."  # of module names in a PeftModel


@dataclass
class Rows:
    """Whose rows stand where in the batch that is on its way: (member's number, how many rows, how long they are), in order."""

    of: list[tuple[int, int, int]] = field(default_factory=list)

    def sizes(self, length: int) -> list[int]:
        """The same as lengths of a first dimension of `length`, which some layers flatten to rows x positions."""
        total = sum(n for _, n, _ in self.of)
        if length % total:
            raise RuntimeError(f"a layer got {length} entries for {total} rows; the members' rows cannot be told apart in it")
        return [n * (length // total) for _, n, _ in self.of]


class JointLinear(torch.nn.Module):
    """A linear layer over the stacked rows of all members, and each member's adapter over its own rows.

    y[rows of k] = W x[rows of k] + scaling_k B_k A_k dropout_k(x[rows of k]), as peft's `lora.Linear.forward` computes it
    for one adapter. W's product is one for all. The adapters are the members' own layers, not copies.
    """

    def __init__(self, base_layer: torch.nn.Module, rows: Rows):
        super().__init__()
        self.base_layer, self.rows = base_layer, rows
        self.members = torch.nn.ModuleDict()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result = self.base_layer(x)
        pieces = []
        # split, not slices: the gradient of all pieces is put together once
        for (member, n, length), own in zip(self.rows.of, x.split(self.rows.sizes(x.shape[0]))):
            if str(member) not in self.members:
                pieces.append(own.new_zeros(*own.shape[:-1], result.shape[-1]))
                continue
            # only as long as the member's own batch is: dropout's masks are drawn for that shape, and the rest is padding
            filled = own.view(n, -1, own.shape[-1])
            added = delta(self.members[str(member)], filled[:, :length])
            pieces.append(F.pad(added, (0, 0, 0, filled.shape[1] - length)).view(*own.shape[:-1], -1))
        return (result + torch.cat(pieces)).to(result.dtype)


def delta(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """What one adapter adds to its layer's output."""
    (name,) = layer.active_adapters
    a, b = layer.lora_A[name], layer.lora_B[name]
    return b(a(layer.lora_dropout[name](layer._cast_input_dtype(x, a.weight.dtype)))) * layer.scaling[name]


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
    freeze(model)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def losses(model: Any, rows: Rows, batches: Sequence[tuple[int, dict[str, Any], float]]) -> list[tuple[Any, Any]]:
    """(sum of the loss over supervised tokens, their number) of each (member, batch, label smoothing), from one pass."""
    rows.of = [(member, *batch["input_ids"].shape) for member, batch, _ in batches]
    logits, targets, keep = supervised_logits(model, stacked([batch for _, batch, _ in batches]))
    counts = [int(part.sum()) for part in keep.split([n for _, n, _ in rows.of])]
    return [
        (F.cross_entropy(own.float(), wanted.to(own.device), reduction="sum", label_smoothing=smoothing), keep.new_tensor(n, dtype=torch.long))
        for own, wanted, n, (_, _, smoothing) in zip(logits.split(counts), targets.split(counts), counts, batches)
    ]


FILL = {"labels": -100}  # what a row is filled up with to the longest; everything else ends in zeros, behind the attention mask


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
