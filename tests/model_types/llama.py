"""Small random models of Meta's line: Llama 3.2 Vision (mllama), Llama 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import LIBRARY, ModelType, ends, opened, qwen_tokenizer, save

# Llama 3's turns, as its documentation describes them.
LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- p.text | trim -}}{%- endif -%}{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""


def words_of_llama(bos: str, eos: str, pad: str, extra: list[str]) -> Any:
    """Byte-level BPE, as Llama 3 has it; special tokens have the last ids."""
    import transformers as t

    words = qwen_tokenizer()
    made = t.TokenizersBackend(tokenizer_object=words._tokenizer, model_max_length=2048)
    made.add_tokens([bos, eos, pad, *extra], special_tokens=True)
    made.bos_token, made.eos_token, made.pad_token = bos, eos, pad
    return made


def mllama(folder: Path) -> None:
    """Pictures enter through cross-attention, cut into at most four tiles; one `<|image|>` stands in the text for each."""
    import transformers as t

    words = words_of_llama("<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>", ["<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>"])
    text = TEXT | ends(words) | {"vocab_size": len(words), "num_hidden_layers": 3, "cross_attention_layers": [1]}
    words.add_tokens(["<|image|>"], special_tokens=True)  # behind the language head's last row
    processor = t.MllamaProcessor(image_processor=t.MllamaImageProcessor(size={"height": 56, "width": 56}), tokenizer=words, chat_template=LLAMA3)
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32,
        "image_size": 56, "patch_size": 28, "intermediate_layers_indices": [0],
    }  # fmt: skip
    config = t.MllamaConfig(vision_config=vision, text_config=text, image_token_index=words.convert_tokens_to_ids("<|image|>"))
    save(folder, opened(t.MllamaForConditionalGeneration, "gate"), config, processor, words)


def llama4(folder: Path) -> None:
    """A mixture of experts; pictures in tiles and whole; layers without positions. The template is the library's."""
    import transformers as t

    marks = ["<|header_start|>", "<|header_end|>", "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
    words = words_of_llama("<|begin_of_text|>", "<|eot|>", "<|finetune_right_pad|>", marks)
    processor = t.Llama4Processor(image_processor=t.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4), tokenizer=words, patch_size=14)
    number = words.convert_tokens_to_ids
    text = TEXT | ends(words) | {
        "vocab_size": len(words), "head_dim": 8, "intermediate_size_mlp": 64, "num_local_experts": 2, "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0], "attention_chunk_size": 64,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14,
        "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32,
    }  # fmt: skip
    config = t.Llama4Config(
        vision_config=vision, text_config=text, image_token_index=number("<|patch|>"), boi_token_index=number("<|image_start|>"),
        eoi_token_index=number("<|image_end|>"),
    )  # fmt: skip
    save(folder, t.Llama4ForConditionalGeneration, config, processor, words)


TYPES = {
    "mllama": ModelType(mllama, "cross-attention, tiled", group="mllama"),
    "llama4": ModelType(llama4, "mixture of experts, tiled", group="llama4", template=LIBRARY),
}
