"""What vLLM gets of a row: the collator's ids with one placeholder for each image, the images, and settings for its sampler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...collators.base import Collator
from ...collators.image_sizes import image_file_sizes
from ...collators.types import BatchMaker
from ...common.errors import RowError, UserError
from ...data.sample import Sample

if TYPE_CHECKING:
    from PIL import Image

# Keys of GenerationConfig that say the same to vLLM, and what SamplingParams calls them.
SAME = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "repetition_penalty": "repetition_penalty"}
DRAWN = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}  # those that count when answers are drawn
TOP_K = 50  # transformers' default when answers are drawn; vLLM's is all tokens
# Keys that say nothing here: the end tokens are the collator's, and the rest belongs to transformers' own loop or to another kind of model.
NOTHING = ("do_sample", "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "use_cache", "cache_implementation", "cache_config",
           "disable_compile", "typical_p", "_from_model_config", "return_dict_in_generate", "num_return_sequences", "assistant_confidence_threshold", "num_assistant_tokens",
           "num_assistant_tokens_schedule", "length_penalty", "early_stopping", "num_beam_groups", "max_length")  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """tokens: with one placeholder for each image. expanded: as the model reads them. labels: as the collator's; all IGNORE for a prompt."""

    tokens: list[int]
    expanded: list[int]
    labels: list[int]
    images: list[Image.Image]


def prompts(collator: BatchMaker, sample: Sample, generation: bool) -> list[Prompt]:
    """The sequences of a row: one for generation, those of training otherwise. Raises UserError for a row that vLLM would read otherwise."""
    if not isinstance(collator, Collator):
        raise TypeError("a collator that keeps image features has no use with vLLM")
    short = collator.unexpanded(sample, generation)
    if collator.row_sizes(sample, image_file_sizes(sample)) is not None:
        raise RowError(sample.id, "sets the sizes of its images itself, which backend=vllm cannot be told; use backend=transformers")
    [row], _ = collator.encode_checked([sample], generation)
    images = sample.load_images()
    return [Prompt(ids, sequence.ids, sequence.labels, images[: sequence.n_images]) for ids, sequence in zip(short, row, strict=True)]


def check_expanded(prompt: Prompt, seen: Sequence[int], where: str) -> None:
    """Raises UserError unless vLLM has made the same tokens of a prompt and its images as the collator."""
    if list(seen) == prompt.expanded:
        return
    ours, theirs = len(prompt.expanded), len(seen)
    place = next((i for i, (a, b) in enumerate(zip(prompt.expanded, seen)) if a != b), min(ours, theirs))
    raise UserError(f"{where}: vLLM reads its prompt as {theirs} tokens where the run's collator makes {ours} (they differ from token {place} on), so its processor"
                    " works otherwise than in training; use backend=transformers (please report it)")  # fmt: skip


def sampling(generation: Mapping[str, Any], model: Mapping[str, Any], end_ids: Sequence[int]) -> dict[str, Any]:
    """Keys of SamplingParams for the section `generation` of a config. Raises UserError for a key that vLLM has no counterpart for.

    model: the generation config that comes with the model, which decides what `generation` leaves open, as in transformers. end_ids: end an answer.
    """
    from transformers import GenerationConfig

    neutral = GenerationConfig().to_dict()
    given = {k: v for k, v in generation.items() if v is not None}
    keys = {**{k: v for k, v in model.items() if v is not None}, **given}
    drawn = bool(keys.get("do_sample"))
    if given.get("max_length") is not None or (given.get("num_beams") or 1) > 1:
        key = "max_length" if given.get("max_length") is not None else "num_beams"
        raise UserError(f"generation.{key}={given[key]}: vLLM has no counterpart; drop it, or use backend=transformers")
    found: dict[str, Any] = {"temperature": 0.0, "stop_token_ids": list(end_ids), "ignore_eos": True}  # the end tokens are the collator's, and no others
    if drawn:
        found |= {"temperature": 1.0, "top_k": TOP_K}
    for key, value in keys.items():
        if key in SAME:
            found[SAME[key]] = value
        elif key in DRAWN:
            found |= {DRAWN[key]: value} if drawn else {}
        elif key not in NOTHING and key != "num_beams" and value != neutral.get(key) and value not in (False, [], {}):
            source = "generation" if key in given else "the model's generation_config.json"
            raise UserError(f"{source}: {key}={value} has no counterpart in vLLM; use backend=transformers")
    return found
