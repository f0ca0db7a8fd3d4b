"""Which part of a vision-language model a module belongs to: audio, vision, connector, qformer, language, generator (of images)."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PARTS = ("audio", "vision", "connector", "qformer", "language", "generator", "other")

# Names that transformers' models give their parts, some with the module they lie in. Earlier entries win, since a connector may lie
# inside the tower (Qwen2-VL's `visual.merger`).
NAMES = {
    "audio": ("audio_tower", "audio_model", "audio_encoder", "embed_audio", "audio_tokenizer"),
    "connector": (
        "multi_modal_projector", "mm_projector", "projector", "resampler_model", "connector", "merger", "merger_list", "deepstack_merger_list",
        "language_projection", "image_newline", "aligner", "vision_projection", "visual_embeddings_table", "view_separator", "layerwise_projectors",
        "spatial_projectors", "density_router", "embed_vision", "vision_adapter", "vision_embed_tokens", "vision_embedder", "image_to_text_projection",
    ),
    "qformer": ("qformer", "query_tokens"),
    "vision": (
        "visual", "vision_tower", "vision_model", "vision_encoder", "image_tower", "video_tower", "high_res_vision_model", "high_res_vision_neck",
        "high_res_vision_proj", "high_res_vision_alpha", "vqmodel", "vision_tokenizer",
    ),
    "generator": ("generation_embeddings", "generation_aligner", "generation_head"),
    "language": ("language_model", "text_model", "lm_head", "embed_tokens", "output_projection", "model.layers", "model.norm", "model.decoder"),
}  # fmt: skip


def is_encoder_decoder(config: object) -> bool:
    """Whether a model with this config reads the prompt in an encoder and writes the answer in a decoder."""
    return any(bool(getattr(c, "is_encoder_decoder", False)) for c in (config, getattr(config, "text_config", None)))


@lru_cache(maxsize=8192)  # a walk through a model asks for the same parameter at every depth
def part_of(name: str) -> str:
    """The part of a module or parameter, by its dotted name."""
    dotted = f".{name}."
    return next((part for part, names in NAMES.items() if any(f".{known}." in dotted for known in names)), "other")


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """part -> number of parameters (4-bit weights count as the weights they hold)."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += size(parameter)
    return {part: n for part, n in counts.items() if n}


def size(parameter: torch.Tensor) -> int:
    """Number of weights in a parameter; bitsandbytes packs two 4-bit weights in a byte."""
    shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
    return int(shape.numel()) if shape is not None else parameter.numel()
