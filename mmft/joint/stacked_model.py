"""The stacked model: one more set of modules over the shared base weights, whose adapted layers serve the rows of every member."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..adapters.freeze import freeze
from ..collators.base import IGNORE
from ..losses.answers import AnswerParts, ObjectiveLoss, objective_loss
from ..losses.objectives import Objective
from ..losses.packing import Packing
from ..losses.supervised import RowGroups, group_sums, summed_loss, supervised_logits, token_weights
from ..rewrites.apply import Rewrites
from ..rewrites.base import Replaced, put
from ..rewrites.gated_mlp import GatedMlp, is_gated
from ..rewrites.last_layer import ReadPositions, narrow_last_layer
from ..rewrites.lora_linear import AdapterRows, LinearParts, LoraProduct, linear_parts, single_dtype
from ..rewrites.rms_norm import RmsNorm, is_rms_norm
from ..rewrites.row_attention import NAME as ROW_ATTENTION
from ..rewrites.row_attention import attend_by_row
from ..rewrites.seeded_dropout import SeededDropout, ones_and_zeros
from ..sweeps.context import modules_over

PREFIX = "base_model.model."  # of module names in a PeftModel


@dataclass
class RowOwners:
    """Which rows of the current batch belong to which member.

    blocks: (member's number, rows, length of the rows), in order. read: supervised positions of each block, in the same order, which is
    what a narrowed last layer sees. tokens: of each block, if the rows of all of them lie end to end in one sequence, without padding; else empty.
    copies: how often the first member's batch occurs, if all members have the same batch.
    """

    blocks: list[tuple[int, int, int]] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    copies: int = 1

    @property
    def rows(self) -> int:
        return sum(n for _, n, _ in self.blocks)

    def sizes(self, length: int) -> list[int]:
        """How many of `length` entries (rows x positions) belong to each block."""
        if self.tokens:
            if length != sum(self.tokens):
                raise RuntimeError(f"a layer got {length} entries for {sum(self.tokens)} packed tokens; the members' rows cannot be told apart in it")
            return self.tokens
        if length % self.rows:
            raise RuntimeError(f"a layer got {length} entries for {self.rows} rows; the members' rows cannot be told apart in it")
        return [n * (length // self.rows) for _, n, _ in self.blocks]


class JointLinear(torch.nn.Module):
    """A linear layer over the stacked rows of all members, with each member's adapter over its own rows.

    The product with W is computed once for all. The adapters are the members' own layers, not copies.
    """

    def __init__(self, base_layer: torch.nn.Module, owners: RowOwners):
        super().__init__()
        self.base_layer, self.owners = base_layer, owners
        self.members = torch.nn.ModuleDict()
        self.positions: ReadPositions | None = None  # if this layer computes only the positions that are read

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._parts(x)
        if not self._is_single_dtype(x):
            return self._separately(x, parts)
        y: torch.Tensor = LoraProduct.apply(x.reshape(-1, x.shape[-1]), parts.base, parts.rows, *parts.matrices)
        return y.view(*x.shape[:-1], -1)

    def parts(self, x: torch.Tensor) -> LinearParts | None:
        """Its parts for x, of which only shape, dtype and device are read; None if values must be cast on the way."""
        return self._parts(x) if self._is_single_dtype(x) else None  # checked first, because _parts draws dropout masks

    def _is_single_dtype(self, x: torch.Tensor) -> bool:
        matrices = (p for layer in self.members.values() for p in (*layer.lora_A.parameters(), *layer.lora_B.parameters()))
        return type(self.base_layer) is torch.nn.Linear and single_dtype(x, self.base_layer, *matrices)

    def _parts(self, x: torch.Tensor) -> LinearParts:
        flat = x.reshape(-1, x.shape[-1])
        index = self.positions.index if self.positions is not None else None
        sizes = self.owners.read if index is not None else self.owners.sizes(flat.shape[0])
        base: Any = self.base_layer
        parts, start = LinearParts(base, [], []), 0
        masks: dict[Any, torch.Tensor] = {}
        for block, size in enumerate(sizes):
            number = str(self.owners.blocks[block][0])
            if number in self.members:
                layer: Any = self.members[number]
                (name,) = layer.active_adapters
                rows = AdapterRows(start, start + size, layer.scaling[name])
                dropout = layer.lora_dropout[name]
                if isinstance(dropout, SeededDropout) and dropout.is_on():
                    rows.kept, rows.factor = self._mask(dropout, block, start, flat, masks), dropout.factor
                parts.rows.append(rows)
                parts.matrices += [layer.lora_A[name].weight, layer.lora_B[name].weight]
            start += size
        return parts

    def _mask(self, dropout: SeededDropout, block: int, start: int, x: torch.Tensor, masks: dict[Any, torch.Tensor]) -> torch.Tensor:
        """The mask of one member's entries: drawn for its own batch, whose rows may be shorter than the longest; the rest is padding."""
        _, n, own_length = self.owners.blocks[block]
        narrowed = self.positions is not None and self.positions.index is not None
        if self.owners.tokens:
            return self._packed_mask(dropout, block, start, x, masks)
        length = self.positions.shape[1] if self.positions is not None and narrowed else x.shape[0] // self.owners.rows
        stream = dropout.stream
        key = (stream.point, dropout.layer, dropout.dropped, n, own_length)
        if key not in masks:  # members with one seed drop the same values
            mask = stream.mask(dropout.layer, n, own_length, x.shape[1], x.device, dropout.dropped)
            padded = mask if own_length == length else F.pad(mask.view(n, own_length, -1), (0, 0, 0, length - own_length), value=True)
            masks[key] = padded.view(n * length, -1)
        if self.positions is None or self.positions.index is None:
            return masks[key]
        first = sum(rows for _, rows, _ in self.owners.blocks[:block]) * length
        return masks[key].index_select(0, self.positions.index[start : start + self.owners.read[block]] - first)

    def _packed_mask(self, dropout: SeededDropout, block: int, start: int, x: torch.Tensor, masks: dict[Any, torch.Tensor]) -> torch.Tensor:
        """The same where rows lie end to end: the member's stream knows the places of its tokens."""
        _, n, own_length = self.owners.blocks[block]
        key = (dropout.stream.point, dropout.layer, dropout.dropped)
        if key not in masks:
            masks[key] = dropout.stream.mask(dropout.layer, n, own_length, x.shape[1], x.device, dropout.dropped)
        if self.positions is None or self.positions.index is None:
            return masks[key]
        return masks[key].index_select(0, self.positions.index[start : start + self.owners.read[block]] - sum(self.owners.tokens[:block]))

    def _separately(self, x: torch.Tensor, parts: LinearParts) -> torch.Tensor:
        """The same with casts on the way, as peft's `lora.Linear.forward` computes it for one adapter."""
        result = self.base_layer(x)
        flat, pieces, end = x.reshape(-1, x.shape[-1]), [], 0
        for rows, a, b in zip(parts.rows, parts.matrices[::2], parts.matrices[1::2]):
            x_k = rows.of(flat)
            if rows.kept is not None:
                x_k = x_k * ones_and_zeros(rows.kept, x_k.dtype) * rows.factor
            pieces += [flat.new_zeros(rows.start - end, result.shape[-1]), F.linear(F.linear(x_k.to(a.dtype), a), b) * rows.scaling]
            end = rows.stop
        pieces.append(flat.new_zeros(flat.shape[0] - end, result.shape[-1]))
        y: torch.Tensor = (result + torch.cat(pieces).view(result.shape)).to(result.dtype)
        return y


def stack_models(
    base: torch.nn.Module, members: Mapping[int, Any], rewrites: Mapping[int, Rewrites], owners: RowOwners, checkpointing: dict[str, Any] | None
) -> Any:
    """New modules over the base weights, with the adapters of `members` (number -> PeftModel) in place.

    rewrites: those of each member; the stacked model gets the ones they have in common. checkpointing:
    `gradient_checkpointing_kwargs`, None without checkpointing.
    """
    from peft.tuners.lora import LoraLayer

    model: Any = modules_over(base)
    for number, member in members.items():
        for name, layer in member.named_modules():
            if not isinstance(layer, LoraLayer):
                continue
            name = name.removeprefix(PREFIX)
            joint = model.get_submodule(name)
            if not isinstance(joint, JointLinear):
                joint = JointLinear(joint, owners)
                model.set_submodule(name, joint)
            joint.members[str(number)] = layer
    replaced = Replaced()
    gated, norms = GatedMlp(lambda layer, x: layer.parts(x) if isinstance(layer, JointLinear) else linear_parts(layer, x)), RmsNorm()
    put(gated, _rewritten(model, gated.name, is_gated, members, rewrites), replaced)
    put(norms, _rewritten(model, norms.name, is_rms_norm, members, rewrites), replaced)
    _compute_positions_once(model, owners)
    freeze(model)
    if all(r.positions is not None for r in rewrites.values()):
        narrow_last_layer(model, replaced)
    if all(ROW_ATTENTION in r.classes for r in rewrites.values()):
        attend_by_row(model, replaced)
    model.train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    return model


def _rewritten(
    model: torch.nn.Module, name: str, is_candidate: Callable[[torch.nn.Module], bool], members: Mapping[int, Any], rewrites: Mapping[int, Rewrites]
) -> list[torch.nn.Module]:
    """The modules of classes to which every member has applied the rewrite `name`, of those that have such modules: an MLP without adapters is none."""
    applied = {number: r.classes.get(name, set()) for number, r in rewrites.items()}
    left = {type(m) for number, member in members.items() for m in member.modules() if is_candidate(m) and type(m) not in applied[number]}
    classes = set().union(*applied.values()) - left
    return [m for m in model.modules() if type(m) in classes and is_candidate(m)]


def _compute_positions_once(model: torch.nn.Module, owners: RowOwners) -> None:
    """If members share a batch, compute position ids only for its first copy: the Qwen families compute them row by row in Python."""
    for module in model.modules():
        if callable(get_rope_index := getattr(module, "get_rope_index", None)):
            # update_wrapper keeps the names of its arguments, which packing looks up
            module.get_rope_index = functools.update_wrapper(functools.partial(_positions_of_first, get_rope_index, owners), get_rope_index)


def _positions_of_first(get_rope_index: Callable[..., Any], owners: RowOwners, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """`get_rope_index`: (positions (3, B, S), deltas (B, 1)) of tensors whose first dimension is rows, or images of rows."""

    def first(value: Any) -> Any:
        return value[: len(value) // owners.copies] if isinstance(value, torch.Tensor) else value

    positions, deltas = get_rope_index(*map(first, args), **{name: first(value) for name, value in kwargs.items()})
    return positions.repeat(1, owners.copies, 1), deltas.repeat(owners.copies, 1)


class MemberBatch(NamedTuple):
    """One member's batch in a joint pass. groups: of its sequences, see losses.supervised.RowGroups. objective, answers: of preferences."""

    member: int
    batch: dict[str, Any]
    label_smoothing: float
    groups: RowGroups | None = None
    objective: Objective | None = None
    answers: AnswerParts | None = None


class SupervisedLoss(NamedTuple):
    """total: sum of the loss over supervised tokens. count: their number. by_group: both by group."""

    total: torch.Tensor
    count: torch.Tensor
    by_group: torch.Tensor | None


def joint_losses(model: Any, owners: RowOwners, batches: Sequence[MemberBatch], pack: Packing | None = None) -> list[SupervisedLoss | ObjectiveLoss]:
    """The loss of each member's batch, from one forward pass. pack: the rows of all of them lie end to end in it."""
    first_ids = batches[0].batch["input_ids"]
    owners.blocks = [(b.member, *b.batch["input_ids"].shape) for b in batches]
    owners.read = [int((b.batch["labels"][:, 1:] != IGNORE).sum()) for b in batches]
    owners.copies = len(batches) if all(b.batch["input_ids"] is first_ids for b in batches) else 1
    owners.tokens = [int(b.batch["attention_mask"].sum()) for b in batches] if pack is not None else []
    stacked = stack_batches([{k: v for k, v in b.batch.items() if k != "loss_weights"} for b in batches])
    logits, targets, keep = supervised_logits(model, stacked if pack is None else pack(stacked))
    rows = keep.split([n for _, n, _ in owners.blocks]) if pack is None else [keep] * len(batches)  # preferences, which read it, are not packed
    return [_own_loss(b, own, wanted, kept) for own, wanted, kept, b in zip(logits.split(owners.read), targets.split(owners.read), rows, batches)]


def _own_loss(b: MemberBatch, logits: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor) -> SupervisedLoss | ObjectiveLoss:
    """The loss of one member. logits, targets, keep: of its own rows, as `supervised_logits` returns them."""
    if b.objective is not None and b.answers is not None:
        return objective_loss(b.objective, b.answers, logits, targets, keep, groups=b.groups)
    weights = token_weights(b.batch)
    return SupervisedLoss(
        summed_loss(logits, targets, weights, b.label_smoothing),
        keep.new_tensor(len(targets), dtype=torch.long),
        None if b.groups is None else group_sums(logits, targets, b.batch["labels"], b.groups, b.label_smoothing, weights),
    )


FILL = {"labels": IGNORE}  # padding of shorter rows; everything else is padded with zeros, which the attention mask excludes


def stack_batches(batches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several batches as one, in order: token rows padded on the right, image tensors concatenated."""
    if len(batches) == 1:
        return batches[0]
    length = max(batch["input_ids"].shape[1] for batch in batches)
    out: dict[str, Any] = {}
    for key in {key: None for batch in batches for key in batch}:  # a batch without images lacks the keys of images
        having = [batch for batch in batches if batch.get(key) is not None]
        parts = [batch[key] for batch in having]
        if not parts:
            out[key] = None
        elif key == "mm_encoder_outputs":
            out[key] = {kind: _join_features([p[kind] for p in parts]) for kind in parts[0]}
        elif parts[0].shape[:2] == having[0]["input_ids"].shape:
            behind = (0, 0) * (parts[0].dim() - 2)  # F.pad begins with the last dimension; masks between tokens and images have four
            out[key] = torch.cat([F.pad(p, (*behind, 0, length - p.shape[1]), value=FILL.get(key, 0)) for p in parts])
        else:
            out[key] = torch.cat(parts)
    return out


def _join_features(outputs: list[Any]) -> Any:
    """The image features of several batches as those of one batch."""
    kind = type(outputs[0])
    pooled = [o.pooler_output for o in outputs]
    joined = kind(pooler_output=torch.cat(pooled) if isinstance(pooled[0], torch.Tensor) else tuple(f for part in pooled for f in part))
    if getattr(outputs[0], "deepstack_features", None):
        levels = zip(*(o.deepstack_features for o in outputs))
        joined["deepstack_features"] = [tuple(f for part in level for f in part) for level in levels]
    return joined
