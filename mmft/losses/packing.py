"""Padding-free packing: the sequences of a batch end to end in one, in which no token sees another sequence.

transformers reads from position ids that restart where a sequence begins, and makes a mask for each (`find_packed_sequence_indices`
in masking_utils.py; FlashAttention computes sequences of different lengths). It does so only without an attention mask. Not every
model hands positions on, so `why_not_packed` compares logits before training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..collators.base import IGNORE
from ..collators.types import Batch, BatchMaker
from ..common.private_api import attention_implementation
from ..common.tensors import eval_mode, to_device
from ..system.memory import is_out_of_memory
from .encoder_decoder import splits_rows
from .supervised import supervised_logits

if TYPE_CHECKING:
    from ..data.sample import Sample

CLOSE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of the largest logit: what rounding may change; HALF for other precisions
HALF = 5e-2
LOOKED_AT = 64  # rows among which those to compare are chosen


class Packing:
    """Packs batches for one model. A batch is padded on the right; its image inputs stay as they are, in the order of the rows."""

    def __init__(self, model: Any):
        # models whose rotary positions have several dimensions (Qwen's) compute them with this method, from the padded rows
        methods = (getattr(module, "get_rope_index", None) for module in model.modules())
        self._rope: Callable[..., Any] | None = next(filter(callable, methods), None)

    def __call__(self, batch: Batch) -> Batch:
        """A batch of one sequence: tensors (B, S) become (1, T), T the tokens without padding; position_ids are added.

        They are (1, T), or (4, 1, T) for several dimensions: first the positions in the text, from which masks are made.
        """
        mask = batch["attention_mask"]
        kept = mask.flatten().nonzero().squeeze(1)
        labels = batch["labels"].clone()
        labels[:, 0] = IGNORE  # no token comes before it; behind another sequence one would
        packed = {
            key: value.flatten().index_select(0, kept)[None] if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
            for key, value in {**batch, "labels": labels}.items() if key != "attention_mask"
        }  # fmt: skip
        return {**packed, "position_ids": self._positions(batch, kept)}

    def _positions(self, batch: Batch, kept: torch.Tensor) -> torch.Tensor:
        rows, length = batch["attention_mask"].shape
        text = torch.arange(length, device=kept.device).repeat(rows).index_select(0, kept)[None]
        if self._rope is None:
            return text
        parameters = inspect.signature(self._rope).parameters
        given = {key: value for key, value in batch.items() if key in parameters}
        if any(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD and name not in given for name, p in parameters.items()):
            return text.expand(4, 1, -1)  # rows without images
        spatial, _ = self._rope(**given)
        return torch.cat([text[None], spatial.to(kept.device).flatten(1).index_select(1, kept)[:, None]])


def why_not_packed(model: Any, collator: BatchMaker, rows: Sequence[Sample], rounds: bool = False) -> str | None:
    """Why rows must not be packed for this model; None if two or three rows give the same logits packed and apart.

    rounds: it computes with quantised weights, whose products depend a little on the batch.
    """
    name = f"{getattr(model.config, 'model_type', type(model).__name__)} with {attention_implementation(model.config)} attention"
    if splits_rows(model):
        return f"{name}: an encoder-decoder model reads prompts and answers in two places"
    try:
        batch = to_device(collator(_some(rows)), model.device)
        batch.pop("row_ids", None)
        pack = Packing(model)
        with torch.no_grad(), eval_mode(model):
            apart, packed = supervised_logits(model, batch)[0], supervised_logits(model, pack(batch))[0]
            changed = supervised_logits(model, pack(_with_other_answer(batch)))[0]
    except Exception as error:  # what a model does with inputs that it was not made for
        if is_out_of_memory(error):
            raise
        return f"{name} cannot compute packed rows ({type(error).__name__}: {' '.join(str(error).split())[:160]})"
    close = HALF if rounds else CLOSE.get(apart.dtype, HALF)
    first = int((batch["labels"][0, 1:] != IGNORE).sum())
    if not bool((packed - apart).abs().max() <= close * apart.abs().max()):
        return f"{name} gives other logits for packed rows than for rows apart"
    if not bool((packed - changed)[first:].abs().max() <= close * apart.abs().max()):
        return f"{name} lets packed rows see each other"
    return None


def _some(rows: Sequence[Sample]) -> list[Sample]:
    """Two or three rows, with images and without if there are both."""
    looked_at = [rows[i * len(rows) // min(len(rows), LOOKED_AT)] for i in range(min(len(rows), LOOKED_AT))]
    kinds = [[row for row in looked_at if bool(row.images) is shown] for shown in (True, False)]
    chosen = [row for kind in kinds for row in kind[: 3 - bool(kinds[0] and kinds[1])]][:3]
    return chosen if len(chosen) > 1 else chosen * 2


def _with_other_answer(batch: Batch) -> Batch:
    """The batch with other tokens in place of the first row's supervised ones; those come from the batch, so none is an image's."""
    ids, supervised = batch["input_ids"].clone(), batch["labels"] != IGNORE
    known = ids[supervised].unique()
    ids[0][supervised[0]] = known[(torch.searchsorted(known, ids[0][supervised[0]]) + 1) % len(known)]
    return {**batch, "input_ids": ids}
