"""Log-likelihoods of several answers to a prompt: images and prompt are computed once, then all answers in one batch."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..collators.base import IGNORE
from ..collators.types import Batch
from ..common.model_parts import is_encoder_decoder
from ..common.tensors import to_device
from ..losses.encoder_decoder import special_ids
from ..losses.supervised import sequence_losses, takes_logits_to_keep

AT_ONCE = 64  # answers in one batch; limits the memory of their logits, which have a value for every token of the vocabulary

Answers = Sequence[Sequence[Sequence[int]]]  # for each row of a batch, equally many answers as token ids


def plain(model: Any, batch: Batch) -> torch.Tensor:
    """(B,) float64 log-likelihoods of the supervised tokens of each sequence of a training batch; every sequence is computed whole."""
    return torch.tensor([-loss for loss, _ in sequence_losses(_base(model), to_device(batch, model.device))], dtype=torch.float64)


def shared(model: Any, prompt: Batch, answers: Answers) -> torch.Tensor:
    """(B, K) float64 log-likelihoods of K answers to each of B prompts. prompt: a batch to generate from, without padding (an
    encoder's prompts may be padded on the right).

    Raises what a model raises that cannot continue from its cache.
    """
    prompt = to_device(prompt, model.device)
    return (_decoded if is_encoder_decoder(model.config) else _continued)(model, prompt, answers).cpu()


def without_images(model: Any, batch: Batch, image_token: int) -> torch.Tensor:
    """`plain` of a model that reads no text without an image (BLIP-2): its language model reads the batch without the image tokens.

    batch: a training batch whose sequences have equally many image tokens.
    """
    text = batch["input_ids"] != image_token
    rows = len(text)
    return plain(_base(model).language_model, {k: batch[k][text].view(rows, -1) for k in ("input_ids", "attention_mask", "labels")})


def needs_pixels(model: Any) -> bool:
    """Whether the model's forward cannot be called without pixel_values."""
    pixels = inspect.signature(type(_base(model)).forward).parameters.get("pixel_values")
    return pixels is not None and pixels.default is inspect.Parameter.empty


def _continued(model: Any, prompt: Batch, answers: Answers) -> torch.Tensor:
    """A causal model: the prompt's last position predicts the first token of each answer, the answers' own positions the others."""
    out = _base(model)(**prompt, use_cache=True, **({"logits_to_keep": 1} if takes_logits_to_keep(model) else {}))
    first = torch.tensor([[answer[0] for answer in row] for row in answers], device=out.logits.device)
    total = out.logits[:, -1].float().log_softmax(-1).gather(1, first).double()
    cache = _output(out, "cache", "past_key_values")
    reader = _reader(model)
    keyword = "cache" if "cache" in inspect.signature(type(reader).forward).parameters else "past_key_values"  # renamed in transformers 5.24
    parts = _parts(answers)
    for start, part in parts:
        ids, targets = _padded([(answer[:-1], answer[1:]) for row in part for answer in row], first.device)
        if ids.shape[1]:
            own = copy.deepcopy(cache) if len(parts) > 1 else cache
            own.reorder_cache(torch.arange(len(part), device=first.device).repeat_interleave(len(part[0])))  # every kind of layer has it
            # without a mask and positions: nothing is padded on the left, and what follows an answer is not seen by it
            total[:, start : start + len(part[0])] += _sums(reader(input_ids=ids, use_cache=True, **{keyword: own}).logits, targets, len(part))
    return total


def _decoded(model: Any, prompt: Batch, answers: Answers) -> torch.Tensor:
    """An encoder-decoder model: its encoder reads image and prompt once."""
    from transformers.modeling_outputs import BaseModelOutput

    start, _ = special_ids(_base(model))
    begin = prompt["input_ids"].new_tensor([start] * len(answers))
    out = _base(model)(**prompt, decoder_input_ids=begin, use_cache=False)
    encoded = _output(out, "encoder_last_hidden_state")
    if encoded.shape[:2] != prompt["attention_mask"].shape:
        raise ValueError("the encoder's output has another length than its prompt")
    total = []
    for _, part in _parts(answers):
        ids, targets = _padded([([*start, *answer[:-1]], [IGNORE] * (len(start) - 1) + [*answer]) for row in part for answer in row], encoded.device)
        copies = len(part[0])
        hidden, mask = (t.repeat_interleave(copies, 0) for t in (encoded, prompt["attention_mask"]))
        logits = _reader(model)(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask, decoder_input_ids=ids, use_cache=False).logits
        total.append(_sums(logits, targets, len(part)))
    return torch.cat(total, 1)


def _parts(answers: Answers) -> list[tuple[int, list[Sequence[Sequence[int]]]]]:
    """The answers in parts of at most AT_ONCE, each with the number of its first answer."""
    size = max(1, AT_ONCE // len(answers))
    return [(start, [row[start : start + size] for row in answers]) for start in range(0, len(answers[0]), size)]


def _padded(pairs: list[tuple[Sequence[int], Sequence[int]]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(inputs, targets), both (N, T), padded on the right."""
    width = max(len(targets) for _, targets in pairs)
    ids, labels = torch.zeros((len(pairs), width), dtype=torch.long), torch.full((len(pairs), width), IGNORE)
    for line, label, (inputs, targets) in zip(ids, labels, pairs, strict=True):
        line[: len(inputs)], label[: len(targets)] = torch.tensor(inputs, dtype=torch.long), torch.tensor(targets, dtype=torch.long)
    return ids.to(device), labels.to(device)


def _sums(logits: torch.Tensor, targets: torch.Tensor, rows: int) -> torch.Tensor:
    """(rows, N / rows) float64 sums of the log-likelihoods of targets (N, T), those that are not IGNORE, under logits (N, T, V)."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten().to(logits.device), ignore_index=IGNORE, reduction="none").double()
    return -losses.view(rows, -1, targets.shape[1]).sum(-1)


def _base(model: Any) -> Any:
    """The model under its adapter, whose layers lie inside it; as in `generate`, an autocast around the adapted model is left out."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _reader(model: Any) -> Any:
    """What reads text after the prompt: the model, or the language model of one that wants pixels at every call."""
    return _base(model).language_model if needs_pixels(model) else _base(model)


def _output(out: Any, *names: str) -> Any:
    """The first of these outputs, of the model or of the language model in it (BLIP-2). Raises AttributeError."""
    for name in names:
        for holder in (out, getattr(out, "language_model_outputs", None)):
            if (value := getattr(holder, name, None)) is not None:
                return value
    raise AttributeError(f"{type(out).__name__} holds no {names[0]}")
