"""LLaVA-NeXT and its relatives: CLIP before Llama, with tiles, with videos, with several layers of the tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT, TOWER, VICUNA

from .base import SIDE, ModelType, ends, llama_tokenizer, save

SQUARE = {"height": SIDE, "width": SIDE}
GRID = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
# From the LLaVA-NeXT documentation of transformers: the instruction format of Mistral.
MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{- ' ' + m.content[0].text + eos_token -}}
{%- else -%}{{- '[INST] ' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- ' [/INST]' -}}{%- endif -%}
{%- endfor -%}"""
# From the VipLlava documentation: roles behind three hashes, and nothing behind an answer.
VIP = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content[0].text -}}
{%- else -%}{{- '###' + ('Human' if m.role == 'user' else 'Assistant') + ': ' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '###Assistant:' -}}{%- endif -%}"""


def llava_next(folder: Path) -> None:
    """The picture whole and in at most 2 x 2 tiles; a learned newline ends every row of the tiles."""
    import transformers as t

    words = llama_tokenizer()
    processor = t.LlavaNextProcessor(
        image_processor=t.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRID), tokenizer=words,
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=MISTRAL,
    )  # fmt: skip
    config = t.LlavaNextConfig(**_parts(words), image_grid_pinpoints=GRID, image_seq_length=16)
    save(folder, t.LlavaNextForConditionalGeneration, config, processor, words)


def llava_next_video(folder: Path) -> None:
    import transformers as t

    words = llama_tokenizer()
    words.add_tokens(["<video>"], special_tokens=True)
    processor = t.LlavaNextVideoProcessor(
        image_processor=t.LlavaNextImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=GRID), tokenizer=words,
        video_processor=t.LlavaNextVideoVideoProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=VICUNA,
    )  # fmt: skip
    config = t.LlavaNextVideoConfig(
        **_parts(words), image_grid_pinpoints=GRID, image_seq_length=16, video_token_index=words.convert_tokens_to_ids("<video>")
    )
    save(folder, t.LlavaNextVideoForConditionalGeneration, config, processor, words)


def vipllava(folder: Path) -> None:
    """Features of three layers of the tower side by side, normalised before the projector."""
    import transformers as t

    words = llama_tokenizer()
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE), tokenizer=words, patch_size=14,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=VIP,
    )  # fmt: skip
    config = t.VipLlavaConfig(**_parts(words), vision_feature_layer=[-2, -3, 2], image_seq_length=16)
    save(folder, t.VipLlavaForConditionalGeneration, config, processor, words)


def video_llava(folder: Path) -> None:
    """One tower for images and another for videos."""
    import transformers as t

    words = llama_tokenizer()
    words.add_tokens(["<video>"], special_tokens=True)
    processor = t.VideoLlavaProcessor(
        image_processor=t.VideoLlavaImageProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE), tokenizer=words,
        video_processor=t.VideoLlavaVideoProcessor(size={"shortest_edge": SIDE}, crop_size=SQUARE),
        patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=VICUNA,
    )  # fmt: skip
    config = t.VideoLlavaConfig(**_parts(words), image_seq_length=16, video_seq_length=136, video_token_index=words.convert_tokens_to_ids("<video>"))
    save(folder, t.VideoLlavaForConditionalGeneration, config, processor, words)


def _parts(words: Any) -> dict[str, Any]:
    return {
        "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **TOWER, "num_hidden_layers": 3},
        "text_config": TEXT | ends(words) | {"model_type": "llama", "vocab_size": len(words)},
        "image_token_index": words.convert_tokens_to_ids("<image>"),
    }


TYPES = {
    "llava_next": ModelType(llava_next, "tiled"),
    "llava_next_video": ModelType(llava_next_video, "tiled"),
    "vipllava": ModelType(vipllava, "dense"),
    "video_llava": ModelType(video_llava, "dense", group="video_llava"),
}
