"""Aria: SigLIP with masks for padded pixels, a projector of queries, and experts in the language model."""

from __future__ import annotations

from pathlib import Path

from small_models import TEXT

from .base import ModelType, byte_level_tokenizer, ends, save

# Written from the documentation of Aria: ChatML with the image between two marks.
CHAT = """\
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<fim_prefix><|img|><fim_suffix>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def aria(folder: Path) -> None:
    """Images of 980 pixels, the size that its processor asks for, in patches of 98; 8 features."""
    import transformers as t

    words = byte_level_tokenizer(["<|im_start|>", "<fim_prefix>", "<fim_suffix>"], "<|im_end|>", "<pad>", "<s>", image_token="<|img|>")
    processor = t.AriaProcessor(image_processor=t.AriaImageProcessor(), tokenizer=words, size_conversion={490: 4, 980: 8}, chat_template=CHAT)
    vision = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 980, "patch_size": 98}
    text = TEXT | ends(words) | {"vocab_size": len(words), "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 16}
    config = t.AriaConfig(
        vision_config={"model_type": "idefics3_vision", **vision}, text_config=text, projector_patch_to_query_dict={25: 4, 100: 8},
        image_token_index=words.convert_tokens_to_ids("<|img|>"),
    )  # fmt: skip
    save(folder, t.AriaForConditionalGeneration, config, processor, words)


TYPES = {"aria": ModelType(aria, "mixture of experts, pooled projector")}
