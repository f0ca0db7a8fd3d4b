"""Meta's Muse models: Muse Glimmer, Muse Spark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import ModelType, ends, save
from .llama import words_of_llama

# Turns like Llama 4's, as the family's documentation describes them.
MUSE = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|header_start|>' + m.role + '<|header_end|>\\n\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|patch|>' -}}{%- else -%}{{- p.text | trim -}}{%- endif -%}{%- endfor -%}
{{- '<|eot|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|header_start|>assistant<|header_end|>\\n\\n' -}}{%- endif -%}"""
MARKS = [
    "<|header_start|>", "<|header_end|>", "<|end_of_text|>", "<|image_start|>", "<|image_end|>", "<|patch|>", "<|video|>", "<|vid_frame_separator|>", "<|vid_start|>",
    "<|vid_end|>", "<|audio|>", "<|soft_audio_start|>", "<|soft_audio_end|>",
]  # fmt: skip


def _muse(folder: Path, family: str, text: dict[str, Any], more: dict[str, Any], parts: dict[str, Any]) -> None:
    import transformers as t

    words = words_of_llama("<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>", MARKS)
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    processor = getattr(t, f"{family}Processor")(
        image_processor=t.MuseGlimmerImageProcessor(**sizes, max_image_tokens=16), video_processor=t.MuseGlimmerVideoProcessor(**sizes), tokenizer=words,
        chat_template=MUSE, **parts,
    )  # fmt: skip
    number = words.convert_tokens_to_ids
    text = TEXT | ends(words) | {"vocab_size": len(words), "head_dim": 8, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 128} | text
    vision = {
        "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 32, "pos_emb_height": 4, "pos_emb_width": 4,
        "max_position_embeddings": 16,
    }  # fmt: skip
    config = getattr(t, f"{family}Config")(
        text_config=text, vision_config=vision, out_hidden_size=64, projector_hidden_size=32, image_token_id=number("<|patch|>"),
        video_token_id=number("<|video|>"), **({"audio_token_id": number("<|audio|>")} if parts else {}), **more,
    )  # fmt: skip
    save(folder, getattr(t, f"{family}ForConditionalGeneration"), config, processor, words)


def muse_glimmer(folder: Path) -> None:
    """Native resolution; window attention in the tower; layers without positions."""
    _muse(folder, "MuseGlimmer", {}, {}, {})


def muse_spark(folder: Path) -> None:
    """Muse Glimmer's tower before a mixture of experts, and a part for sounds."""
    import transformers as t

    text = {"moe_intermediate_size": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_hidden_size": 16}
    audio = {"patch_sizes": [4, 2], "hidden_sizes": [8, 16], "depths": [1, 1], "num_hidden_layers": 2, "out_hidden_size": 32}
    _muse(folder, "MuseSpark", text, {"audio_config": audio}, {"feature_extractor": t.MuseSparkFeatureExtractor()})


TYPES = {
    "muse_glimmer": ModelType(muse_glimmer, "native resolution, window attention"),
    "muse_spark": ModelType(muse_spark, "native resolution, mixture of experts"),
}
