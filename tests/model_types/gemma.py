"""Google's vision-language models: Gemma 3, Gemma 3n, Gemma 4, PaliGemma."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_models
from small_models import GEMMA, TEXT, TOWER

from .base import SIDE, ModelType, byte_fallback_words, opened, save

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
AUDIO = {"audio_token": "<audio_soft_token>", "boa_token": "<start_of_audio>", "eoa_token": "<end_of_audio>"}
# Gemma 4's turns, as its documentation describes them; the system turn is one of its own.
GEMMA4 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- p.text | trim -}}{%- endif -%}{%- endfor -%}
{{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}"""
TEXT_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}


def named_tokens(words: Any, named: dict[str, str]) -> Any:
    """The tokenizer with attributes such as image_token and image_token_id, which are saved with it."""
    words._set_model_specific_special_tokens(special_tokens=named)
    return words


def gemma3n(folder: Path) -> None:
    """A convolutional tower of timm; the last ids of the vocabulary belong to pictures and sounds and have tables of their own."""
    import transformers as t

    vocabulary, merges = byte_fallback_words(SPECIAL, prefix_space=False)
    named = {"boi_token": "<start_of_image>", "boa_token": "<start_of_audio>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
             "eoa_token": "<end_of_audio>", "audio_token": "<audio_soft_token>"}  # fmt: skip
    words = t.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    words.add_tokens(SPECIAL[5:], special_tokens=True)
    words.add_tokens(list(named.values()), special_tokens=True)
    words = named_tokens(words, named)
    processor = t.Gemma3nProcessor(
        feature_extractor=t.Gemma3nAudioFeatureExtractor(), image_processor=t.SiglipImageProcessor(size={"height": 64, "width": 64}, do_normalize=False),
        tokenizer=words, chat_template=GEMMA.replace("<start_of_image>", "<image_soft_token>"), image_seq_length=4, audio_seq_length=4,
    )  # fmt: skip
    number = words.convert_tokens_to_ids
    offset, sounds = number("<end_of_image>"), number("<end_of_audio>")
    text = TEXT | TEXT_IDS | {
        "vocab_size": len(words), "head_dim": 8, "sliding_window": 64, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": offset, "hidden_size_per_layer_input": 8,
        "altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    }  # fmt: skip
    vision = {"architecture": "test_efficientnet", "hidden_size": 256, "vocab_size": sounds - offset, "vocab_offset": offset}
    audio = {
        "hidden_size": 16, "conf_num_attention_heads": 2, "conf_num_hidden_layers": 1, "sscp_conv_channel_size": [4, 2],
        "vocab_size": len(words) - sounds, "vocab_offset": sounds,
    }  # fmt: skip
    config = t.Gemma3nConfig(
        text_config=text, vision_config=vision, audio_config=audio, vision_soft_tokens_per_image=4, audio_soft_tokens_per_image=4,
        boi_token_id=number("<start_of_image>"), eoi_token_id=offset, image_token_id=number("<image_soft_token>"), boa_token_id=number("<start_of_audio>"),
        eoa_token_id=sounds, audio_token_id=number("<audio_soft_token>"),
    )  # fmt: skip
    save(folder, opened(t.Gemma3nForConditionalGeneration, "correct_output_scale"), config, processor, words, eos=[1, number("<end_of_turn>")])


def _gemma4_words() -> tuple[Any, dict[str, str]]:
    import transformers as t

    turns = ["<|turn>", "<turn|>"]
    vocabulary, merges = byte_fallback_words([*SPECIAL[:5], *turns], prefix_space=False)
    named = {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "boa_token": "<|audio>", "eoa_token": "<audio|>", "audio_token": "<|audio|>"}
    words = t.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    words.add_tokens(turns, special_tokens=True)
    words.add_tokens([*named.values(), "<|video|>"], special_tokens=True)
    return named_tokens(words, named), named


def _gemma4(folder: Path, family: str, text: dict[str, Any], vision: dict[str, Any], audio: Any) -> None:
    import transformers as t

    words, named = _gemma4_words()
    sizes = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
    extractor = getattr(t, f"{family}AudioFeatureExtractor", None) or t.Gemma4AudioFeatureExtractor
    processor = getattr(t, f"{family}Processor")(
        feature_extractor=extractor(), image_processor=getattr(t, f"{family}ImageProcessor")(**sizes), tokenizer=words,
        video_processor=getattr(t, f"{family}VideoProcessor")(**sizes), chat_template=GEMMA4, image_seq_length=70,
    )  # fmt: skip
    number = words.convert_tokens_to_ids
    ids = {f"{name}_id": number(token) for name, token in named.items() if name != "eoa_token"}
    common = TEXT | TEXT_IDS | {
        "vocab_size": len(words), "vocab_size_per_layer_input": len(words), "head_dim": 8, "global_head_dim": 8, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"],
        "use_bidirectional_attention": "vision",
    }  # fmt: skip
    config = getattr(t, f"{family}Config")(
        text_config=common | text, vision_config=vision, audio_config=audio, video_token_id=number("<|video|>"), eoa_token_index=number("<audio|>"), **ids
    )
    save(folder, getattr(t, f"{family}ForConditionalGeneration"), config, processor, words, eos=[1, number("<turn|>")])


def gemma4(folder: Path) -> None:
    """As many features as the picture's shape asks for; an embedding for every layer; no part for sounds, as in the larger sizes."""
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "pooling_kernel_size": 2, "patch_size": 4, "position_embedding_size": 64,
    }  # fmt: skip
    _gemma4(folder, "Gemma4", {"hidden_size_per_layer_input": 8}, vision, None)


def gemma4_unified(folder: Path) -> None:
    """No tower: patches enter the language model through one dense layer."""
    vision = {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 64, "output_proj_dims": 16}
    _gemma4(folder, "Gemma4Unified", {}, vision, None)


def paligemma(folder: Path) -> None:
    """The picture and the prompt are read in both directions, the answer from left to right."""
    import transformers as t

    vocabulary, merges = byte_fallback_words(SPECIAL[:5], prefix_space=False)
    words = t.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)
    image_processor = t.SiglipImageProcessor(size={"height": SIDE, "width": SIDE})
    image_processor.image_seq_length = 16
    processor = t.PaliGemmaProcessor(image_processor=image_processor, tokenizer=words)
    text = TEXT | TEXT_IDS | {"model_type": "gemma2", "vocab_size": len(words), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64}
    config = t.PaliGemmaConfig(
        text_config=text, vision_config=TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}, projection_dim=32, hidden_size=32,
        image_token_index=words.convert_tokens_to_ids("<image>"), vocab_size=len(words),
    )  # fmt: skip
    save(folder, t.PaliGemmaForConditionalGeneration, config, processor, words)


def t5gemma2(folder: Path) -> None:
    """Gemma 3 with an encoder that reads in both directions and a decoder whose attention reads both."""
    import transformers as t

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    vocabulary, merges = byte_fallback_words([*SPECIAL[:5], *named.values()], prefix_space=False)
    words = t.GemmaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True, extra_special_tokens=named)
    processor = t.Gemma3Processor(image_processor=t.Gemma3ImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer=words, image_seq_length=4)
    number = words.convert_tokens_to_ids
    text = TEXT | TEXT_IDS | {
        "vocab_size": len(words), "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    encoder = {
        "text_config": text, "vision_config": TOWER | {"model_type": "siglip_vision_model", "vision_use_head": False}, "mm_tokens_per_image": 4,
        "boi_token_index": number("<start_of_image>"), "eoi_token_index": number("<end_of_image>"), "image_token_index": number("<image_soft_token>"),
    }  # fmt: skip
    config = t.T5Gemma2Config(encoder=encoder, decoder=text, image_token_index=number("<image_soft_token>"))
    save(folder, t.T5Gemma2ForConditionalGeneration, config, processor, words)


TYPES = {
    "gemma3": ModelType(small_models.gemma3, "pooled projector", group="gemma3"),
    "gemma3n": ModelType(gemma3n, "convolutional tower, embeddings for each layer"),
    "gemma4": ModelType(gemma4, "native resolution, pooled, embeddings for each layer"),
    "gemma4_unified": ModelType(gemma4_unified, "native resolution, no tower"),
    "t5gemma2": ModelType(t5gemma2, "encoder-decoder, pooled projector", collator="completion", template="none: completions"),
    "paligemma": ModelType(paligemma, "prefix language model", group="paligemma", collator="completion", template="none: completions"),
}
