"""Attention over packed rows, row by row: a token of a packed sequence sees its own row alone, so nothing else is computed.

transformers' own sdpa attention computes every pair of tokens of the packed sequence and masks most of them. Here the mask says which rows lie
in the sequence, and each is computed by itself, as a causal one. Both functions are registered with transformers' AttentionInterface and
AttentionMaskInterface, under a name of their own; a batch that is not packed is computed as with sdpa.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..common.private_api import attention_implementation
from .base import Replaced

NAME = "row_attention"
IMPLEMENTATION = "mmft_row_attention"  # as transformers knows it
DEVICES = ("cpu",)  # where it is used; on others the masked kernels were not compared with it


@dataclass(frozen=True)
class PackedRows:
    """What a layer gets in place of a mask: the tokens of each packed row, in order; their sum is the length of the sequence."""

    lengths: tuple[int, ...]


def packed_rows(mask: torch.Tensor) -> PackedRows | None:
    """The rows of a mask (1, 1, S, S), True where a token sees another; None if it is another mask than that of causal rows end to end.

    Token i of a row that begins at s has to see exactly s ... i. So its first visible token is s, it sees i - s + 1 of them, and none behind i.
    """
    seen = mask[0, 0]
    at = torch.arange(len(seen), device=seen.device)
    first = seen.to(torch.uint8).argmax(dim=1)  # of equal values the first
    begins = first == at
    own = torch.where(begins, at, 0).cummax(dim=0).values  # where the row of each token begins, if rows lie end to end
    causal = bool((first == own).all()) and bool((seen.sum(dim=1) == at - own + 1).all()) and bool(seen.diagonal().all()) and not bool(seen.triu(1).any())
    if not causal:
        return None
    starts = begins.nonzero().squeeze(1).tolist()
    return PackedRows(tuple(end - start for start, end in zip(starts, [*starts[1:], len(seen)])))


def row_mask(batch_size: int, q_length: int, kv_length: int, *args: Any, **kwargs: Any) -> torch.Tensor | PackedRows | None:
    """What `attend` gets as its mask, from the arguments of transformers' mask functions: PackedRows if that says all, else sdpa's mask."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    mask: torch.Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](batch_size, q_length, kv_length, *args, **kwargs)
    if mask is None or mask.dtype != torch.bool or mask.shape[0] != 1 or q_length != kv_length or q_length == 1:
        return mask
    return packed_rows(mask) or mask


def attend(
    module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | PackedRows | None,
    dropout: float = 0.0, scaling: float | None = None, **kwargs: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """query (B, heads, S, d), key and value (B, their heads, S, d) -> ((B, S, heads, d), None), as transformers' attention functions.

    Keys and values of fewer heads are repeated: torch's kernel takes them as they are, but divides its backward pass among the threads by them.
    Raises NotImplementedError for what sdpa's function does beside attention.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if not isinstance(attention_mask, PackedRows):
        y: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
        return y
    if odd := [name for name in ("position_bias", "softcap") if kwargs.get(name) is not None]:
        raise NotImplementedError(f"{odd[0]} over packed rows")
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], dim=1) for each in (key, value))
    rows = zip(*(each.split(attention_mask.lengths, dim=2) for each in (query, key, value)))
    outputs = [F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling) for q, k, v in rows]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def attend_outside_of_graphs() -> None:
    """Let torch.compile leave `attend` out of what it compiles: the lengths of the packed rows are others in every batch. Until `attend_by_row` is called again."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, torch.compiler.disable(attend))


def attend_by_row(model: Any, replaced: Replaced) -> bool:
    """Let the language model of `model` (with or without an adapter) attend row by row; False if it does not use sdpa attention, or cannot be told."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.utils import logging as library_log

    top = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = top.config.get_text_config(decoder=True)
    key = next((name for name in top.config.sub_configs if getattr(top.config, name) is text), None)
    if attention_implementation(text) != "sdpa" or (key is None and text is not top.config):
        return False
    AttentionInterface.register(IMPLEMENTATION, attend)
    AttentionMaskInterface.register(IMPLEMENTATION, row_mask)

    def use(name: str) -> None:
        level = library_log.get_verbosity()
        library_log.set_verbosity_error()  # it remarks on every part that cannot be told, vision parts among them
        try:
            top.set_attn_implementation(name if key is None else {key: name})
        finally:
            library_log.set_verbosity(level)

    use(IMPLEMENTATION)
    if attention_implementation(text) != IMPLEMENTATION:
        return False
    replaced.changed(NAME, type(top), lambda: use("sdpa"))
    return True
