"""Liquid AI's lines: language models with short convolutions behind SigLIP 2 or a tower with convolutions of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import ModelType, byte_level_tokenizer, ends, save

# Written from the families' documentation: ChatML behind a token that begins the text.
CHAT = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- 'IMAGE_PLACE' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def lfm2_vl(folder: Path) -> None:
    """Large images in tiles of 32 pixels beside the whole; the position of each tile is a token."""
    import transformers as t

    places = [f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5)]
    words = _words(
        places, image_token="<image>", image_start_token="<|image_start|>", image_end_token="<|image_end|>", image_thumbnail_token="<|img_thumbnail|>"
    )
    image_processor = t.Lfm2VlImageProcessor(tile_size=32, encoder_patch_size=8, min_image_tokens=1, max_image_tokens=4, max_tiles=4)
    processor = t.Lfm2VlProcessor(image_processor=image_processor, tokenizer=words, chat_template=CHAT.replace("IMAGE_PLACE", "<image>"))
    tower = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "num_patches": 16}
    text = TEXT | ends(words) | {
        "model_type": "lfm2", "vocab_size": len(words), "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True,
    }  # fmt: skip
    config = t.Lfm2VlConfig(
        vision_config={"model_type": "siglip2_vision_model", "vision_use_head": False, **tower}, text_config=text,
        image_token_id=words.convert_tokens_to_ids("<image>"), projector_hidden_size=32, downsample_factor=2,
    )  # fmt: skip
    save(folder, t.Lfm2VlForConditionalGeneration, config, processor, words)


def lfm3_vl(folder: Path) -> None:
    """Images in their own shape; full and sliding attention among the convolutions."""
    import transformers as t

    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>"}
    words = _words(list(marks.values()))
    sizes = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}}
    processor = t.Lfm3VlProcessor(
        image_processor=t.Qwen2VLImageProcessor(**sizes), tokenizer=words, video_processor=t.Qwen3VLVideoProcessor(**sizes),
        chat_template=CHAT.replace("IMAGE_PLACE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "layer_types": ["conv", "full_attention"],
    }  # fmt: skip
    text = TEXT | ends(words) | {
        "model_type": "lfm3", "vocab_size": len(words), "num_hidden_layers": 3, "layer_types": ["conv", "sliding_attention", "full_attention"],
        "head_dim": 8, "sliding_window": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(token) for name, token in marks.items()}
    config = t.Lfm3VlConfig(vision_config=vision, text_config=text, projector_hidden_size=32, **ids)
    save(folder, t.Lfm3VlForConditionalGeneration, config, processor, words)


def _words(special: list[str], **named: str) -> Any:
    return byte_level_tokenizer(["<|im_start|>", *special], "<|im_end|>", "<|pad|>", "<|startoftext|>", **named)


TYPES = {
    "lfm2_vl": ModelType(lfm2_vl, "hybrid convolution, tiled"),
    "lfm3_vl": ModelType(lfm3_vl, "hybrid convolution, native resolution"),
}
