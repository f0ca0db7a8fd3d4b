"""Greedy decoding of many prompts: a row whose answer has ended leaves the batch, and waiting rows take the free places.

transformers' `generate` prepares inputs, masks and cache and calls the function given as `custom_generate`, which computes the first token
here. Rows are joined by aligning their ends: keys of shorter rows get zeros on the left, which the attention mask hides. Positions are counted
for each row alone, so that a row computes what it would compute in a batch of its own, up to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import Cache
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from ..collators.types import Batch
from ..common.errors import UserError
from ..common.model_parts import is_encoder_decoder
from ..common.tensors import to_device
from ..config.validate import SAMPLING
from .joined_cache import JOINABLE, aligned, joined_layer

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 and newer; older
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
PROMPT_ONLY = ("pixel_", "image_", "video_", "mm_encoder_outputs", "inputs_embeds", "second_per_grid_ts", "batch_num_images")  # begin the names of inputs that are read once

NEUTRAL = {key: SAMPLING[key] for key in ("temperature", "top_p", "top_k", "typical_p")}  # transformers' defaults, of which it warns in no case


class Undecodable(Exception):
    """Why rows are not decoded here, for the user; transformers' `generate` decodes them."""


@dataclass(frozen=True)
class Decoded:
    """The tokens that one row has written. ended: the last one is an end token; otherwise the row reached the limit."""

    key: int
    ids: list[int]
    ended: bool


def group_size(places: int) -> int:
    """Rows that enter a batch together. Fewer would rebuild the batch more often, more would leave places empty for longer."""
    return max(1, places // 4)


def decode(model: Any, groups: Iterator[tuple[list[int], Batch]], settings: GenerationConfig, places: int) -> Iterator[Decoded]:
    """Decode the prompts of `groups`, in the order in which they end; at most `places` rows at once.

    groups: (keys, prompt batch) of at most `group_size(places)` rows; read when there are places for one. Raises Undecodable, and
    UserError for settings that transformers refuses.
    """
    if reason := why_not(settings):
        raise Undecodable(reason)
    ends, limit = frozenset(settings.eos_token_id), settings.max_new_tokens
    rows: Rows | None = None
    more = True
    while True:
        while more and (rows is None or len(rows.keys) - len(rows.finished) + group_size(places) <= places):
            if (group := next(groups, None)) is None:
                more = False
                break
            keys, batch = group
            new = generate(model, batch, settings, custom_generate=first_tokens)
            new.keys, new.ids = keys, [[] for _ in keys]
            yield from new.write(ends, limit)
            rows = new if rows is None else rows.joined(new)
        if rows is None or len(rows.finished) == len(rows.keys):
            if not more:
                return
            rows = None
            continue
        if len(rows.finished) >= group_size(len(rows.keys)):
            rows = rows.joined(None)
        rows.step()
        yield from rows.write(ends, limit)


def generate(model: Any, inputs: Batch, settings: GenerationConfig, **options: Any) -> Any:
    """The model's `generate`; options: its further arguments. Raises UserError for settings that transformers refuses."""
    if not settings.do_sample:  # sampling settings that the model brings would only make transformers warn of them
        settings = copy.deepcopy(settings)
        settings.update(defaults_only=True, **NEUTRAL)
    with torch.no_grad():
        try:
            return model.generate(**to_device(inputs, model.device), generation_config=settings, **options)
        except ValueError as error:
            raise UserError(f"generation: {str(error).strip().splitlines()[0]}") from None


def why_not(settings: GenerationConfig) -> str | None:
    """Why these settings need transformers' own loop; None if they do not."""
    mode = settings.get_generation_mode()
    if mode != "greedy_search":
        return str(getattr(mode, "value", mode)).replace("_", " ")
    if settings.cache_implementation not in (None, "dynamic"):
        return f"cache_implementation={settings.cache_implementation}"
    if settings.max_new_tokens is None:
        return "max_length counts the prompt's tokens"
    return "prefill_chunk_size" if settings.prefill_chunk_size is not None else None


@torch.no_grad()
def first_tokens(part: Any, input_ids: torch.Tensor, logits_processor: Sequence[Any], stopping_criteria: Sequence[Any], generation_config: Any, **given: Any) -> Rows:
    """The function for `custom_generate`: one pass over the prompts. Raises Undecodable.

    part: the model, or the language model in it whose `generate` was called.
    """
    if is_encoder_decoder(part.config):
        raise Undecodable(f"{type(part).__name__} is an encoder-decoder model")
    if others := [type(p).__name__ for p in logits_processor if type(p) is not RepetitionPenaltyLogitsProcessor]:
        raise Undecodable(", ".join(others))
    if others := [type(c).__name__ for c in stopping_criteria if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]:
        raise Undecodable(", ".join(others))
    name = next((n for n in CACHE_NAMES if isinstance(given.get(n), DynamicCache)), None)
    if name is None:
        raise Undecodable(f"{type(part).__name__} uses a cache of its own")
    kept = {k: v for k, v in given.items() if k not in (name, "attention_mask", "position_ids", *TOKEN_TYPES) and v is not None and not k.startswith(PROMPT_ONLY)}
    if unknown := [k for k, v in kept.items() if not isinstance(v, (bool, int, float, str))]:
        raise Undecodable(f"{type(part).__name__} reads {', '.join(unknown)} at every token")
    outputs = part(**part.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **given), return_dict=True)
    cache = given[name]
    width = cache.get_seq_length()
    for layer in cache.layers:
        if type(layer) not in JOINABLE or layer.get_seq_length() != width:
            raise Undecodable(f"{type(part).__name__} keeps more than keys and values of its tokens")
    logits = outputs.logits[:, -1]
    mask, positions = given.get("attention_mask"), given.get("position_ids")
    if mask is None:  # generate drops a mask without padding
        mask = torch.ones(len(logits), width, dtype=torch.long, device=logits.device)
    if logits_processor and input_ids.shape[1] != width:
        raise Undecodable("repetition_penalty for a prompt without token ids")
    seen = filled(input_ids, mask) if logits_processor else None
    types = {k: given[k][:, -1:] if k == "token_type_ids" else torch.zeros_like(given[k][:, -1:]) for k in TOKEN_TYPES if given.get(k) is not None}
    fixed = Fixed(part, name, kept, tuple(RepetitionPenaltyLogitsProcessor(p.penalty) for p in logits_processor))
    return Rows(fixed, cache, mask, None if positions is None else positions[..., -1:] + 1, types, seen, fixed.greedy(logits, seen), logits=logits)


def filled(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Token ids (B, S) with the last one of each row in place of padding, so that a penalty for repeated tokens counts no padding."""
    return torch.where(mask > 0, ids, ids[:, -1:])


@dataclass(frozen=True)
class Fixed:
    """What does not change while rows are decoded. name: of the argument that takes the cache. kept: further arguments of every pass."""

    part: Any
    name: str
    kept: dict[str, Any]
    processors: tuple[Any, ...]

    def greedy(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """The next token (B,) of each row, by logits (B, V)."""
        return self.processed(logits, seen).argmax(dim=-1)

    def processed(self, logits: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
        """The logits (B, V) in fp32 with what the settings do to them."""
        logits = logits.float()
        for processor in self.processors:
            logits = processor(seen, logits)
        return logits


@dataclass
class Rows:
    """Rows that are decoded together.

    mask: (B, S), S tokens in the cache. positions: (..., B, 1) of the next token, None if the model takes none. types: (B, 1) of the
    next token. seen: (B, S) all tokens in the cache, if the processors need them. last: (B,) the tokens written last. ids: what each row has
    written. finished: places of rows that have ended and still lie in the batch. logits: (B, V) by which `last` was chosen.
    """

    fixed: Fixed
    cache: Cache
    mask: torch.Tensor
    positions: torch.Tensor | None
    types: dict[str, torch.Tensor]
    seen: torch.Tensor | None
    last: torch.Tensor
    keys: list[int] = field(default_factory=list)
    ids: list[list[int]] = field(default_factory=list)
    finished: set[int] = field(default_factory=set)
    logits: torch.Tensor | None = None

    @torch.no_grad()
    def step(self) -> None:
        """One token more for each row."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=-1)
        if self.seen is not None:
            self.seen = torch.cat([self.seen, self.last[:, None]], dim=-1)
        part = self.fixed.part
        inputs = part.prepare_inputs_for_generation(
            self.last[:, None], next_sequence_length=1, attention_mask=self.mask, position_ids=self.positions, **{self.fixed.name: self.cache},
            **self.types, **self.fixed.kept,
        )  # fmt: skip
        if inputs.get("position_ids") is None:  # then a row would change its positions when it moves in the batch
            raise Undecodable(f"{type(part).__name__} counts positions by its cache")
        self.logits = part(**inputs, return_dict=True).logits[:, -1]
        self.last = self.fixed.greedy(self.logits, self.seen)
        if self.positions is not None:
            self.positions = self.positions + 1

    def write(self, ends: frozenset[int], limit: int) -> Iterator[Decoded]:
        """Add the last tokens to the rows, and yield those that are finished by them."""
        for place, token in enumerate(self.last.tolist()):
            if place in self.finished:
                continue
            ids, ended = self.ids[place], token in ends
            ids.append(token)
            if ended or len(ids) >= limit:
                self.finished.add(place)
                yield Decoded(self.keys[place], ids, ended)

    def joined(self, new: Rows | None) -> Rows:
        """The rows that are not finished, and then those of `new`, in a batch that is as wide as its longest row."""
        places = [(rows, [p for p in range(len(rows.keys)) if p not in rows.finished]) for rows in (self, new) if rows is not None]
        parts = [(rows, torch.tensor(open_, device=rows.mask.device)) for rows, open_ in places if open_]
        if not parts:
            return self
        masks = [rows.mask[chosen] for rows, chosen in parts]
        width = max(int(mask.sum(dim=1).max()) for mask in masks)
        mask = torch.cat([aligned(m, width, -1) for m in masks])
        cache = DynamicCache()
        cache.layers = [joined_layer([(rows.cache.layers[n], chosen) for rows, chosen in parts], width) for n in range(len(self.cache.layers))]
        positions = [rows.positions[..., chosen, :] for rows, chosen in parts if rows.positions is not None]
        seen = [aligned(rows.seen[chosen], width, -1) for rows, chosen in parts if rows.seen is not None]
        return Rows(
            self.fixed, cache, mask, torch.cat(positions, dim=-2) if positions else None,
            {k: torch.cat([rows.types[k][chosen] for rows, chosen in parts]) for k in self.types}, filled(torch.cat(seen), mask) if seen else None,
            torch.cat([rows.last[chosen] for rows, chosen in parts]),
            [rows.keys[p] for rows, open_ in places for p in open_], [rows.ids[p] for rows, open_ in places for p in open_],
        )  # fmt: skip
