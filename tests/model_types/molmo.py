"""Small random model of Molmo 2."""

from __future__ import annotations

from pathlib import Path

from small_models import TEXT

from .base import ModelType, ends, qwen_tokenizer, save

# Molmo 2's turns, as its documentation describes them: all pictures first, roles alternate, no end token behind an answer.
MOLMO2 = """\
{%- set places = namespace(n=0) -%}
{%- for m in messages -%}{%- for p in m.content -%}{%- if p.type == 'image' -%}{%- set places.n = places.n + 1 -%}{%- endif -%}{%- endfor -%}{%- endfor -%}
{%- for i in range(places.n) -%}{{- ('Image ' ~ (i + 1) if places.n > 1 else '') ~ '<|image|>' -}}{%- endfor -%}
{%- for m in messages -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('Conversation roles must alternate user/assistant') -}}{%- endif -%}
{%- if m.role == 'user' and not loop.first -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'text' -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{%- if m.role == 'user' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
MARKS = ["<im_start>", "<im_end>", "<im_patch>", "<im_col>", "<low_res_im_start>", "<|image|>", "<im_low>", "<frame_start>", "<frame_end>", "<|video|>"]


def molmo2(folder: Path) -> None:
    """Overlapping crops and the whole picture, pooled two by two by attention; features are added to the places' own embeddings."""
    import transformers as t

    words = qwen_tokenizer()
    words.bos_token = "<|im_end|>"  # the processor begins every text with it
    size = len(words)
    words.add_tokens(MARKS, special_tokens=True)
    side = {"height": 56, "width": 56}
    processor = t.Molmo2Processor(
        image_processor=t.Molmo2ImageProcessor(size=side, max_crops=2, overlap_margins=[1, 1]), tokenizer=words,
        video_processor=t.Molmo2VideoProcessor(size=side), chat_template=MOLMO2, use_single_crop_col_tokens=False,
    )  # fmt: skip
    number = words.convert_tokens_to_ids
    text = TEXT | ends(words) | {"vocab_size": size, "additional_vocab_size": len(MARKS), "head_dim": 8}
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "image_size": [56, 56], "patch_size": 14,
    }  # fmt: skip
    adapter = {
        "vision_feature_layer": [-1, 0], "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32,
        "text_hidden_size": 32,
    }  # fmt: skip
    config = t.Molmo2Config(
        vision_config=vision, adapter_config=adapter, text_config=text, image_patch_id=number("<im_patch>"), image_start_token_id=number("<im_start>"),
        image_end_token_id=number("<im_end>"), low_res_image_start_token_id=number("<low_res_im_start>"), frame_start_token_id=number("<frame_start>"),
        frame_end_token_id=number("<frame_end>"),
    )  # fmt: skip
    save(folder, t.Molmo2ForConditionalGeneration, config, processor, words)


TYPES = {"molmo2": ModelType(molmo2, "tiled, pooled by attention", group="molmo2")}
