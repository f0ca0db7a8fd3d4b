"""Qwen's vision-language models, and those that are built from Qwen's parts with Qwen's processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import small_models

from .base import CHATML, QWEN, ModelType, byte_level_tokenizer, ends, grid_processors, merged, save, shrink, token_ids

TOKENS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEMPLATE = CHATML.replace("IMAGE_PLACE", "<|vision_start|><|image_pad|><|vision_end|>")  # from Qwen3 on: without a system message of its own
IDS = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
TOWER = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "num_position_embeddings": 64, "patch_size": 16}
# Three layers of four compute linear attention in the published sizes; here one of two.
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
}  # fmt: skip


def _qwen3(folder: Path, name: str, text: dict[str, Any], vision: dict[str, Any], processor: str = "Qwen3VLProcessor", ids: dict[str, str] = IDS, **top: Any) -> None:
    """name: what the classes of config and model begin with."""
    import transformers as t

    words = byte_level_tokenizer(TOKENS, "<|im_end|>", "<|endoftext|>")
    parts = grid_processors("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", patch=16)
    made = getattr(t, processor)(**parts, tokenizer=words, chat_template=TEMPLATE)
    given = {"text_config": {"vocab_size": len(words), "rope_parameters": ROPE} | ends(words) | text, "vision_config": TOWER | vision, **token_ids(words, **ids)}
    config = shrink(getattr(t, f"{name}Config"), **merged(given, top))
    save(folder, getattr(t, f"{name}ForConditionalGeneration"), config, made, words)


def qwen3_vl_moe(folder: Path) -> None:
    _qwen3(folder, "Qwen3VLMoe", {}, {"deepstack_visual_indexes": [0]})


def qwen3_5(folder: Path) -> None:
    _qwen3(folder, "Qwen3_5", LINEAR, {})


def qwen3_5_moe(folder: Path) -> None:
    _qwen3(folder, "Qwen3_5Moe", LINEAR, {})


def qwen4_exp(folder: Path) -> None:
    """With hyper-connections, an n-gram embedding in the linear layer, and an indexer in the attention layer."""
    text = LINEAR | {
        "layer_types": ["linear_attention", "indexed_attention"], "hc_count": 2, "hc_lowrank": 8, "ple_layer_ids": [1], "ple_embed_dim": 32,
        "heads_per_ngram": 2, "ngram_size": 3, "ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2,
        "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 512, "indexer_compress_ratio": 2,
        "shared_expert_intermediate_size": 16,
    }  # fmt: skip
    _qwen3(folder, "Qwen4Exp", text, {})


def cosmos3_omni(folder: Path) -> None:
    _qwen3(folder, "Cosmos3Omni", {}, {"deepstack_visual_indexes": [0]})


def exaone4_5(folder: Path) -> None:
    """Exaone 4 as the language model, a tower like Qwen2.5-VL's with grouped keys."""
    import transformers as t

    words = byte_level_tokenizer(["<|system|>", "<|user|>", "<|assistant|>", "<vision>", "</vision>", "<|image_pad|>", "<|video_pad|>"], "[|endofturn|]", "[PAD]", "[BOS]")
    template = """\
{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' -}}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<vision><|image_pad|></vision>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- '[|endofturn|]\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""
    parts = grid_processors("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    vision = {"hidden_size": 16, "num_heads": 2, "num_key_value_heads": 1, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    config = shrink(
        t.Exaone4_5_Config, text_config={"vocab_size": len(words), "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 512} | ends(words),
        vision_config=vision, **token_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"),
    )  # fmt: skip
    save(folder, t.Exaone4_5_ForConditionalGeneration, config, t.Exaone4_5_Processor(**parts, tokenizer=words, chat_template=template), words)


OMNI = {
    "image_token": "<|IMAGE|>", "audio_token": "<|AUDIO|>", "video_token": "<|VIDEO|>", "vision_bos_token": "<|vision_bos|>", "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
}  # fmt: skip
OMNI_3 = OMNI | {"image_token": "<|image_pad|>", "audio_token": "<|audio_pad|>", "video_token": "<|video_pad|>", "vision_bos_token": "<|vision_start|>",
                 "vision_eos_token": "<|vision_end|>", "audio_bos_token": "<|audio_start|>", "audio_eos_token": "<|audio_end|>"}  # fmt: skip


def qwen2_5_omni_thinker(folder: Path) -> None:
    vision = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    _omni(folder, "Qwen2_5Omni", OMNI, 14, "Qwen2VLVideoProcessor", QWEN, {"rope_parameters": rope}, vision, {})


def qwen3_omni_moe_thinker(folder: Path) -> None:
    vision = TOWER | {"deepstack_visual_indexes": [0]}
    audio = {"n_window": 4, "n_window_infer": 8, "conv_chunksize": 8, "downsample_hidden_size": 8}
    _omni(folder, "Qwen3OmniMoe", OMNI_3, 16, "Qwen2VLVideoProcessor", TEMPLATE, {"rope_parameters": ROPE, "head_dim": 8}, vision, audio)


def _omni(folder: Path, name: str, named: dict[str, str], patch: int, video: str, template: str, text: Any, vision: Any, audio: Any) -> None:
    """The thinker: what reads images and writes text."""
    import transformers as t

    words = byte_level_tokenizer(["<|im_start|>"], "<|im_end|>", "<|endoftext|>", **named)
    template = template.replace("<|vision_start|><|image_pad|><|vision_end|>", named["vision_bos_token"] + named["image_token"] + named["vision_eos_token"])
    parts = grid_processors("Qwen2VLImageProcessor", video, patch=patch)
    made = getattr(t, f"{name}Processor")(**parts, feature_extractor=t.WhisperFeatureExtractor(feature_size=16), tokenizer=words, chat_template=template)
    ids = token_ids(words, image_token_id=named["image_token"], video_token_id=named["video_token"], audio_token_id=named["audio_token"],
                    audio_start_token_id=named["audio_bos_token"])  # fmt: skip
    if name == "Qwen2_5Omni":
        ids["audio_end_token_id"] = words.convert_tokens_to_ids(named["audio_eos_token"])
        ids |= {key.replace("_id", "_index"): ids.pop(key) for key in ("image_token_id", "video_token_id", "audio_token_id")}
    config = shrink(
        getattr(t, f"{name}ThinkerConfig"), text_config={"vocab_size": len(words)} | ends(words) | text, vision_config=vision,
        audio_config={"num_mel_bins": 16, "encoder_ffn_dim": 32, "output_dim": 32, "max_source_positions": 32} | audio, user_token_id=words.convert_tokens_to_ids("u"), **ids, **token_ids(words, vision_start_token_id=named["vision_bos_token"], vision_end_token_id=named["vision_eos_token"]),
    )  # fmt: skip
    save(folder, getattr(t, f"{name}ThinkerForConditionalGeneration"), config, made, words)


TYPES = {
    "qwen2_vl": ModelType(small_models.qwen2vl, "native resolution", group="qwen2vl"),
    "qwen2_5_vl": ModelType(small_models.qwen2_5vl, "native resolution, window attention", group="qwen2_5vl"),
    "qwen3_vl": ModelType(small_models.qwen3vl, "native resolution, deepstack", group="qwen3vl"),
    "qwen3_vl_moe": ModelType(qwen3_vl_moe, "mixture of experts, deepstack", group="qwen3vl_moe"),
    "qwen3_5": ModelType(qwen3_5, "hybrid linear attention", group="qwen3_5"),
    "qwen3_5_moe": ModelType(qwen3_5_moe, "hybrid linear attention, mixture of experts", group="qwen3_5_moe"),
    "qwen4_exp": ModelType(qwen4_exp, "hybrid linear attention, mixture of experts, hyper-connections", group="qwen3vl"),
    "qwen2_5_omni_thinker": ModelType(qwen2_5_omni_thinker, "native resolution, window attention", group="qwen2_5vl"),
    "qwen3_omni_moe_thinker": ModelType(qwen3_omni_moe_thinker, "mixture of experts, deepstack", group="qwen3vl"),
    "cosmos3_omni": ModelType(cosmos3_omni, "native resolution, deepstack", group="qwen3vl"),
    "exaone4_5": ModelType(exaone4_5, "native resolution, window attention", group="qwen2_5vl"),
}
