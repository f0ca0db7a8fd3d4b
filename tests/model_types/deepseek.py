"""DeepSeek's lines: DeepSeek-VL with one tower or two, and Janus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT, TOWER

from .base import SIDE, ModelType, byte_level_words, ends, save

BEGIN, END, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
# Written from the families' documentation: names before the texts, two newlines between turns, an end token behind answers.
ROLES = """\
{%- if messages[0].role != 'system' -%}{{- 'You are a helpful language and vision assistant.\\n\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{{- m.content[0].text + '\\n\\n' -}}
{%- else -%}{{- ('USER_NAME' if m.role == 'user' else 'ASSISTANT_NAME') + ': ' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<image_placeholder>\\n' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '\\n\\n' if m.role == 'user' else eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT_NAME:' -}}{%- endif -%}"""
SIZE = {"height": SIDE, "width": SIDE}


def deepseek_vl(folder: Path) -> None:
    import transformers as t

    words = _words(image_token="<image_placeholder>")
    processor = t.DeepseekVLProcessor(
        image_processor=t.DeepseekVLImageProcessor(size=SIZE), tokenizer=words, num_image_tokens=16, chat_template=_roles("User", "Assistant")
    )
    config = t.DeepseekVLConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}, text_config=_llama(words),
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    save(folder, t.DeepseekVLForConditionalGeneration, config, processor, words)


def deepseek_vl_hybrid(folder: Path) -> None:
    """A SAM tower for the picture at a higher resolution, beside SigLIP."""
    import transformers as t

    words = _words(image_token="<image_placeholder>")
    processor = t.DeepseekVLHybridProcessor(
        image_processor=t.DeepseekVLHybridImageProcessor(size=SIZE, high_res_size={"height": 64, "width": 64}), tokenizer=words, num_image_tokens=16,
        chat_template=_roles("User", "Assistant"),
    )  # fmt: skip
    sam = {"hidden_size": 24, "output_channels": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "window_size": 2}
    config = t.DeepseekVLHybridConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **TOWER}, text_config=_llama(words),
        high_res_vision_config={"model_type": "sam_vision_model", **sam, "mlp_dim": 48, "global_attn_indexes": [0]},
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    save(folder, t.DeepseekVLHybridForConditionalGeneration, config, processor, words)


def janus(folder: Path) -> None:
    """Reads images as DeepSeek-VL does; a second set of modules, unused here, generates them."""
    import transformers as t

    words = _words(image_token="<image_placeholder>", boi_token="<begin_of_image>", eoi_token="<end_of_image>")
    processor = t.JanusProcessor(
        image_processor=t.JanusImageProcessor(size=SIZE), tokenizer=words, num_image_tokens=16, use_default_system_prompt=True,
        chat_template=_roles("<|User|>", "<|Assistant|>").partition("{%- endif -%}\n")[2],
    )  # fmt: skip
    vision = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14, "mlp_ratio": 2}
    quantizer = {
        "embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32, "channel_multiplier": [1, 1], "num_res_blocks": 1,
        "projection_dim": 32, "image_token_embed_dim": 32,
    }  # fmt: skip
    config = t.JanusConfig(
        vision_config=vision | {"projection_dim": 32, "depth": 2, "num_image_tokens": 16}, vq_config=quantizer, text_config=_llama(words),
        image_token_id=words.convert_tokens_to_ids("<image_placeholder>"),
    )  # fmt: skip
    save(folder, t.JanusForConditionalGeneration, config, processor, words)


def _words(**named: str) -> Any:
    """A byte-level BPE that puts a token before every text, as DeepSeek's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary, merges = byte_level_words(splitter)
    learned = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    learned.pre_tokenizer, learned.decoder = splitter, decoders.ByteLevel()
    learned.add_special_tokens([BEGIN, END, PAD])
    learned.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, learned.token_to_id(BEGIN))])
    return PreTrainedTokenizerFast(
        tokenizer_object=learned, bos_token=BEGIN, eos_token=END, pad_token=PAD, extra_special_tokens=named, model_max_length=4096
    )


def _roles(user: str, assistant: str) -> str:
    return ROLES.replace("USER_NAME", user).replace("ASSISTANT_NAME", assistant)


def _llama(words: Any) -> dict[str, Any]:
    return TEXT | ends(words) | {"model_type": "llama", "vocab_size": len(words), "tie_word_embeddings": True}


TYPES = {
    "deepseek_vl": ModelType(deepseek_vl, "dense"),
    "deepseek_vl_hybrid": ModelType(deepseek_vl_hybrid, "dense, two towers"),
    "janus": ModelType(janus, "dense", group="janus"),
}
