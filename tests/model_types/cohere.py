"""Cohere's lines: Aya Vision and Command A Vision with tiles, and North Vision (cohere_compass) with layers of the tower handed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT, TOWER

from .base import SIDE, ModelType, byte_level_tokenizer, ends, save

# Written from the families' documentation: turns between two tokens, a token for the role.
TURNS = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|START_OF_TURN_TOKEN|>' + {'user': '<|USER_TOKEN|>', 'system': '<|SYSTEM_TOKEN|>', 'assistant': '<|CHATBOT_TOKEN|>'}[m.role] -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- 'IMAGE_PLACE' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|END_OF_TURN_TOKEN|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' -}}{%- endif -%}"""
ROLES = ["<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|CHATBOT_TOKEN|>"]


def aya_vision(folder: Path) -> None:
    """`<image>` stands for tiles of 4 features; each tile has a name, which is text."""
    import transformers as t

    words = _words([*ROLES, "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "<image>", "TILE_GLOBAL", "TILE"])
    processor = t.AyaVisionProcessor(
        image_processor=t.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=4, crop_to_patches=True),
        tokenizer=words, patch_size=14, img_size=SIDE, downsample_factor=2, chat_template=TURNS.replace("IMAGE_PLACE", "<image>"),
    )  # fmt: skip
    config = t.AyaVisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}, text_config=_cohere2(words),
        image_token_index=words.convert_tokens_to_ids("<|IMG_PATCH|>"), downsample_factor=2,
    )  # fmt: skip
    save(folder, t.AyaVisionForConditionalGeneration, config, processor, words)


def cohere2_vision(folder: Path) -> None:
    import transformers as t

    named = {"boi_token": "<|START_OF_IMG|>", "eoi_token": "<|END_OF_IMG|>", "image_token": "<|IMG_PATCH|>", "img_line_break_token": "<|IMG_LINE_BREAK|>"}
    words = _words(ROLES, **named)
    processor = t.Cohere2VisionProcessor(
        image_processor=t.Cohere2VisionImageProcessor(size={"height": SIDE, "width": SIDE}, max_patches=4, patch_size=2), tokenizer=words,
        chat_template=TURNS.replace("IMAGE_PLACE", "<|IMG_PATCH|>"),
    )  # fmt: skip
    config = t.Cohere2VisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}, text_config=_cohere2(words),
        image_token_id=words.convert_tokens_to_ids("<|IMG_PATCH|>"), downsample_factor=2, alignment_intermediate_size=48,
    )  # fmt: skip
    save(folder, t.Cohere2VisionForConditionalGeneration, config, processor, words)


def cohere_compass(folder: Path) -> None:
    """Positions of an image in three directions, one layer of the tower handed to the language model, and a sliding window."""
    import transformers as t

    marks = {"vision_start": "<|VISION_START|>", "vision_end": "<|VISION_END|>", "image": "<|IMAGE_PAD|>", "video": "<|VIDEO_PAD|>"}
    words = _words([*ROLES, *marks.values()])
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}}
    processor = t.CohereCompassProcessor(
        image_processor=t.CohereCompassImageProcessor(**sizes), tokenizer=words, video_processor=t.CohereCompassVideoProcessor(**sizes),
        chat_template=TURNS.replace("IMAGE_PLACE", "<|VISION_START|><|IMAGE_PAD|><|VISION_END|>"),
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = TEXT | ends(words) | {
        "vocab_size": len(words), "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "tie_word_embeddings": True,
        "rope_parameters": {"sliding_attention": rope, "full_attention": rope}, "logit_scale": 0.5,
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "patch_size": 16, "spatial_merge_size": 2,
        "temporal_patch_size": 2, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in marks.items()}
    config = t.CohereCompassConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    save(folder, t.CohereCompassForConditionalGeneration, config, processor, words)


def _words(special: list[str], **named: str) -> Any:
    return byte_level_tokenizer(special, "<|END_OF_TURN_TOKEN|>", "<PAD>", "<BOS_TOKEN>", **named)


def _cohere2(words: Any) -> dict[str, Any]:
    return TEXT | ends(words) | {
        "model_type": "cohere2", "vocab_size": len(words), "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64, "logit_scale": 0.25,
        "tie_word_embeddings": True,
    }  # fmt: skip


TYPES = {
    "aya_vision": ModelType(aya_vision, "tiled"),
    "cohere2_vision": ModelType(cohere2_vision, "tiled"),
    "cohere_compass": ModelType(cohere_compass, "deepstack, native resolution"),
}
