"""Mistral's lines with Pixtral's tower: Mistral Small 3, and LightOnOCR, which has Qwen3 behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import CHATML, ModelType, byte_level_tokenizer, ends, qwen_tokenizer, save

# Written from the documentation of Mistral Small 3.1.
INST = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- '[SYSTEM_PROMPT]' + m.content[0].text + '[/SYSTEM_PROMPT]' -}}
{%- elif m.role == 'assistant' -%}{{- m.content[0].text + eos_token -}}
{%- else -%}{{- '[INST]' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '[IMG]' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '[/INST]' -}}{%- endif -%}
{%- endfor -%}"""
SPECIAL = ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
TOWER = {"model_type": "pixtral", "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}


def mistral3(folder: Path) -> None:
    """Images in their own shape, 2 x 2 patches of 14 pixels to a feature; a token ends each line of them."""
    import transformers as t

    words, processor = _pixtral()
    text = TEXT | ends(words) | {"model_type": "mistral", "head_dim": 8, "vocab_size": len(words), "sliding_window": None}
    config = t.Mistral3Config(
        vision_config=TOWER, text_config=text, image_token_index=words.convert_tokens_to_ids("[IMG]"), spatial_merge_size=2, tie_word_embeddings=False
    )
    save(folder, t.Mistral3ForConditionalGeneration, config, processor, words)


def lighton_ocr(folder: Path) -> None:
    import transformers as t

    words = qwen_tokenizer(["<|vision_start|>"], image_token="<|image_pad|>", image_break_token="<|vision_pad|>", image_end_token="<|vision_end|>")
    processor = t.LightOnOcrProcessor(
        image_processor=t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 28, "width": 28}), tokenizer=words, patch_size=14,
        spatial_merge_size=2, chat_template=CHATML.replace("IMAGE_PLACE", "<|image_pad|>"),
    )  # fmt: skip
    text = TEXT | ends(words) | {"model_type": "qwen3", "head_dim": 8, "vocab_size": len(words), "tie_word_embeddings": True}
    config = t.LightOnOcrConfig(
        vision_config=TOWER | {"hidden_act": "silu"}, text_config=text, image_token_id=words.convert_tokens_to_ids("<|image_pad|>"), spatial_merge_size=2
    )
    save(folder, t.LightOnOcrForConditionalGeneration, config, processor, words)


def _pixtral() -> tuple[Any, Any]:
    import transformers as t

    words = byte_level_tokenizer(SPECIAL, "</s>", "<pad>", "<s>")
    processor = t.PixtralProcessor(
        image_processor=t.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}), tokenizer=words, patch_size=14,
        spatial_merge_size=2, chat_template=INST,
    )  # fmt: skip
    return words, processor


TYPES = {
    "mistral3": ModelType(mistral3, "native resolution"),
    "lighton_ocr": ModelType(lighton_ocr, "native resolution"),
}
