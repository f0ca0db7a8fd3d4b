"""Encoder-decoder models: from a batch in which the answer follows the prompt to the encoder's and the decoder's inputs.

Collators lay out every row as prompt and answer in one sequence, which is what decoder-only models read. An encoder-decoder model
(BLIP-2 with Flan-T5, Florence-2) reads the prompt in its encoder and writes the answer in its decoder, from a start token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..collators.base import IGNORE
from ..common.model_parts import is_encoder_decoder

if TYPE_CHECKING:
    import torch


def splits_rows(model: Any) -> bool:
    """Whether rows must be split for this model (under adapters and wrappers)."""
    inner = getattr(model, "module", model)  # DistributedDataParallel
    return is_encoder_decoder(getattr(inner, "config", None))


def decoder_logits(model: Any, inputs: dict[str, Any], labels: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of the n supervised tokens of a batch in the one-sequence layout, in the order of `labels` (B, S)."""
    encoder, decoder_labels = split_batch(inputs, labels, *special_ids(getattr(model, "module", model)))
    logits = model(**inputs | encoder, use_cache=False).logits
    return logits[decoder_labels != IGNORE]


def split_batch(inputs: dict[str, Any], labels: torch.Tensor, start: Sequence[int], pad: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(input_ids and attention_mask (B, S') of the encoder with decoder_input_ids (B, T), the decoder's labels (B, T)).

    Each row's supervised tokens are its last ones. start: the tokens that begin every text of the decoder; the first answer token is
    predicted at the last of them. pad: fills shorter rows.
    """
    import torch

    supervised = labels != IGNORE
    length = int(supervised.sum(1).max())
    position = torch.arange(labels.shape[1], device=labels.device)
    first = torch.where(supervised, position, labels.shape[1]).amin(1, keepdim=True)  # of each row's supervised tokens
    mask = inputs["attention_mask"] * (position < first)
    ids = torch.where(mask.bool(), inputs["input_ids"], pad)
    width = int(mask.sum(1).max())
    targets = labels.new_full((labels.shape[0], length), IGNORE)
    targets[torch.arange(length, device=labels.device) < supervised.sum(1, keepdim=True)] = labels[supervised]
    begin = targets.new_tensor(start).expand(len(targets), -1)
    decoder_ids = torch.cat([begin, targets[:, :-1].masked_fill(targets[:, :-1] == IGNORE, pad)], 1)
    targets = torch.cat([torch.full_like(begin[:, 1:], IGNORE), targets], 1)
    return {"input_ids": ids[:, :width], "attention_mask": mask[:, :width], "decoder_input_ids": decoder_ids}, targets


def special_ids(model: Any) -> tuple[list[int], int]:
    """(tokens that begin every text of the decoder, pad_token_id) of the language model.

    They are decoder_start_token_id and, for models of BART's kind (Florence-2), the token that generation is forced to write first.
    """
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    candidates = (text, getattr(config, "text_config", None), config)

    def first(name: str) -> int | None:
        return next((value for c in candidates if (value := getattr(c, name, None)) is not None), None)

    pad = first("pad_token_id")
    start = first("decoder_start_token_id")
    forced = getattr(getattr(model, "generation_config", None), "forced_bos_token_id", None)
    begin = [start if start is not None else pad if pad is not None else 0]
    return [*begin, *([forced] if forced is not None else [])], (pad if pad is not None else 0)
