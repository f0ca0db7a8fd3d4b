"""Models that read documents, and others of native resolution: PaddleOCR-VL, ERNIE, Hunyuan 4, dots, VideoLLaMA 3, Cosmos, HyperCLOVA X."""

from __future__ import annotations

from pathlib import Path

from .base import CHATML, ModelType, byte_level_tokenizer, byte_level_words, ends, grid_processors, save, shrink, token_ids

TOWER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}


def paddleocr_vl(folder: Path) -> None:
    import transformers as t

    named = {"image_token": "<|IMAGE_PLACEHOLDER|>"}
    words = byte_level_tokenizer(["<|IMAGE_START|>", "<|IMAGE_END|>", "<|video_pad|>"], "</s>", "<unk>", "<|begin_of_sentence|>", **named)
    template = """\
{{- '<|begin_of_sentence|>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- for p in m.content -%}{{- p.text + '\\n' -}}{%- endfor -%}
{%- elif m.role == 'user' -%}{{- 'User: ' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '\\n' -}}
{%- else -%}{{- 'Assistant:\\n' -}}{%- for p in m.content -%}{{- p.text -}}{%- endfor -%}{{- '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:\\n' -}}{%- endif -%}"""
    ids = {"image_token_id": "<|IMAGE_PLACEHOLDER|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|IMAGE_START|>", "vision_end_token_id": "<|IMAGE_END|>"}
    config = shrink(
        t.PaddleOCRVLConfig, text_config={"vocab_size": len(words), "rope_parameters": MROPE} | ends(words), vision_config=TOWER, **token_ids(words, **ids)
    )
    parts = grid_processors("PaddleOCRVLImageProcessor", None, temporal=1)
    save(folder, t.PaddleOCRVLForConditionalGeneration, config, t.PaddleOCRVLProcessor(**parts, tokenizer=words, chat_template=template), words)


def ernie4_5_vl_moe(folder: Path) -> None:
    """Experts of two widths: those for text and those for images."""
    import transformers as t

    named = {
        "image_token": "<|IMAGE_PLACEHOLDER|>", "image_start_token": "<|IMAGE_START|>", "image_end_token": "<|IMAGE_END|>", "video_token": "<|VIDEO_PLACEHOLDER|>",
        "video_start_token": "<|VIDEO_START|>", "video_end_token": "<|VIDEO_END|>",
    }  # fmt: skip
    words = byte_level_tokenizer(["<|begin_of_sentence|>"], "</s>", "<unk>", **named)
    template = """\
{{- '<|begin_of_sentence|>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- for p in m.content -%}{{- p.text + '\\n' -}}{%- endfor -%}
{%- elif m.role == 'user' -%}{{- 'User: ' -}}
{%- for p in m.content -%}
{%- if p.type == 'image' -%}{{- 'Picture 1:<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}
{%- endfor -%}
{{- '\\n' -}}
{%- else -%}{{- 'Assistant: ' -}}{%- for p in m.content -%}{{- p.text -}}{%- endfor -%}{{- '</s>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}"""
    text = {
        "vocab_size": len(words), "moe_intermediate_size": [16, 8], "moe_num_shared_experts": 1, "moe_k": 2, "moe_num_experts": 4, "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_hidden_layers": 3, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    ids = {f"{kind}_id": token for kind, token in named.items()}
    config = shrink(t.Ernie4_5_VLMoeConfig, text_config=text | ends(words), vision_config={"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}, **token_ids(words, **ids))
    parts = grid_processors("Ernie4_5_VLMoeImageProcessor", None, temporal=1) | {"video_processor": t.Ernie4_5_VLMoeVideoProcessor(draw_on_frames=False)}
    save(folder, t.Ernie4_5_VLMoeForConditionalGeneration, config, t.Ernie4_5_VLMoeProcessor(**parts, tokenizer=words, chat_template=template), words)


def hy_v4_vl(folder: Path) -> None:
    """Latent attention with an indexer, hyper-connections, experts with a shared one; a newline ends every row of image tokens."""
    import transformers as t

    words = byte_level_tokenizer(["<|hy_User|>", "<|hy_Assistant|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], "<|hy_eos|>", "<|hy_pad|>", "<|hy_bos|>")
    template = """\
{{- '<|hy_bos|>' -}}
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- for p in m.content -%}{{- p.text -}}{%- endfor -%}
{%- elif m.role == 'user' -%}{{- '<|hy_User|>' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{%- else -%}{{- '<|hy_Assistant|>' -}}{%- for p in m.content -%}{{- p.text -}}{%- endfor -%}{{- '<|hy_eos|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|hy_Assistant|>' -}}{%- endif -%}"""
    text = {
        "vocab_size": len(words), "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "index_topk": 512, "index_head_dim": 8, "index_n_heads": 2, "indexer_types": ["full", "full"], "hc_mult": 2, "mlp_layer_types": ["dense", "sparse"], "initializer_range": 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = TOWER | {"out_hidden_size": 32, "max_image_size": 128, "num_key_value_heads": 2}
    config = shrink(t.HYV4VLConfig, text_config=text | ends(words), vision_config=vision, **token_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>"))
    parts = grid_processors("HYV4VLImageProcessor", "HYV4VLVideoProcessor", patch=16, temporal=1)
    save(folder, t.HYV4VLForConditionalGeneration, config, t.HYV4VLProcessor(**parts, tokenizer=words, chat_template=template), words)


def dots3_note(folder: Path) -> None:
    import transformers as t

    words = byte_level_tokenizer(["<|img|>", "<|imgpad|>", "<|endofimg|>", "<|video_pad|>", "<|audio_comp_pad|>", "<|userprompt|>", "<|endofuserprompt|>", "<|response|>"],
                                 "<|endofresponse|>", "<|endoftext|>", "[BOS]")  # fmt: skip
    template = """\
{%- for m in messages -%}
{%- if m.role == 'system' -%}{%- for p in m.content -%}{{- p.text -}}{%- endfor -%}
{%- elif m.role == 'user' -%}{{- '<|userprompt|>' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|img|><|imgpad|><|endofimg|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|endofuserprompt|>' -}}
{%- else -%}{{- '<|response|>' -}}{%- for p in m.content -%}{{- p.text -}}{%- endfor -%}{{- '<|endofresponse|>' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|response|>' -}}{%- endif -%}"""
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
    text = latent | {
        "vocab_size": len(words), "num_key_value_heads": 4, "qk_rope_head_dim": 8, "head_dim": 16, "index_topk": 512, "index_head_dim": 8, "index_n_heads": 2,
        "layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"], "shared_experts_intermediate_size": 16, "sliding_window": 512,
        "rope_parameters": None, "per_layer_config": {1: latent | {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8}},
    }  # fmt: skip
    vision = TOWER | {"mlp_layer_types": ["dense", "sparse"], "num_local_experts": 2, "num_experts_per_tok": 1, "adapter_in_dim": 16, "adapter_out_dim": 32, "per_layer_config": None}
    audio = {"num_key_value_heads": 4, "feature_size": 16, "downsample_hidden_size": 8, "adapter_input_size": 32, "adapter_out_dim": 32, "head_dim": 8}
    ids = token_ids(words, image_token_id="<|imgpad|>", video_token_id="<|video_pad|>", audio_token_id="<|audio_comp_pad|>")
    config = t.Dots3NoteConfig(
        text_config=_plain(t.Dots3NoteTextConfig, text | ends(words)), vision_config=_plain(t.Dots3NoteVisionConfig, vision), audio_config=_plain(t.Dots3NoteAudioConfig, audio), **ids
    )
    parts = grid_processors("Qwen2VLImageProcessor", None, temporal=1) | {"video_processor": t.Qwen3VLVideoProcessor()}
    made = t.Dots3NoteProcessor(**parts, feature_extractor=t.Dots3NoteFeatureExtractor(feature_size=16), tokenizer=words, chat_template=template)
    save(folder, t.Dots3NoteForConditionalGeneration, config, made, words)


def _plain(config_class: type, given: dict[str, object]) -> dict[str, object]:
    """Sizes by the rules and `given`, without the values that the class derives from its own defaults."""
    from .base import RULES

    fields = {name: getattr(config_class, name) for name in config_class.__dataclass_fields__ if isinstance(getattr(config_class, name, None), int)}
    small = {n: min(v, new) for n, v in fields.items() if not isinstance(v, bool) for tails, new in RULES[:-1] if n.endswith(tails) and isinstance(new, int)}
    return small | given


def video_llama_3(folder: Path) -> None:
    import transformers as t

    words = byte_level_tokenizer(["<|im_start|>", "<|image_pad|>", "<|video_pad|>"], "<|im_end|>", "<|endoftext|>")
    parts = grid_processors("VideoLlama3ImageProcessor", "VideoLlama3VideoProcessor", merge=1, temporal=1)
    made = t.VideoLlama3Processor(**parts, tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<|image_pad|>\\n"))
    ids = token_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    config = shrink(t.VideoLlama3Config, text_config={"vocab_size": len(words)} | ends(words), vision_config=TOWER | {"patch_size": 14}, **ids)
    save(folder, t.VideoLlama3ForConditionalGeneration, config, made, words)


def cosmos3_edge(folder: Path) -> None:
    import transformers as t

    words = byte_level_tokenizer(["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"], "<|im_end|>", "<pad>", "<s>")
    parts = grid_processors("Cosmos3EdgeImageProcessor", "Cosmos3EdgeVideoProcessor", patch=16, temporal=1)
    made = t.Cosmos3EdgeProcessor(**parts, tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<|vision_start|><|image_pad|><|vision_end|>"))
    ids = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>", "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    config = shrink(
        t.Cosmos3EdgeConfig, text_config={"vocab_size": len(words), "rope_parameters": MROPE} | ends(words), vision_config=TOWER | {"num_patches": 16},
        projector_hidden_size=64, **token_ids(words, **ids),
    )  # fmt: skip
    save(folder, t.Cosmos3EdgeForConditionalGeneration, config, made, words)


def hyperclovax_vision_v2(folder: Path) -> None:
    """Qwen2.5-VL's tower before HyperCLOVA X."""
    import transformers as t
    from tokenizers.pre_tokenizers import ByteLevel

    vocabulary, merges = byte_level_words(ByteLevel(add_prefix_space=False))
    words = t.GPT2Tokenizer(vocab=vocabulary, merges=merges, unk_token=None, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048)
    words.add_tokens(["<|im_start|>", "<|image_start|>", "<|image_end|>", "<|image_pad|>", "<|video_pad|>", "<|video_duration|>"], special_tokens=True)
    parts = grid_processors("Qwen2VLImageProcessor", "Qwen2VLVideoProcessor")
    made = t.HyperCLOVAXVisionV2Processor(**parts, tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<|image_start|><|image_pad|><|image_end|>"))
    vision = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32, "window_size": 56, "fullatt_block_indexes": [1]}
    text = {"vocab_size": len(words), "num_key_value_heads": 2, "attention_multiplier": None}
    ids = token_ids(words, image_token_id="<|image_pad|>", video_token_id="<|video_pad|>")
    config = shrink(t.HyperCLOVAXVisionV2Config, text_config=text | ends(words), vision_config=vision, **ids)
    save(folder, t.HyperCLOVAXVisionV2ForConditionalGeneration, config, made, words)


TYPES = {
    "paddleocr_vl": ModelType(paddleocr_vl, "native resolution", group="paddleocr_vl"),
    "ernie4_5_vl_moe": ModelType(ernie4_5_vl_moe, "mixture of experts by modality"),
    "hy_v4_vl": ModelType(hy_v4_vl, "mixture of experts, hyper-connections, newline features", group="hy_v4_vl"),
    "dots3_note": ModelType(dots3_note, "mixture of experts in tower and language model"),
    "video_llama_3": ModelType(video_llama_3, "native resolution"),
    "cosmos3_edge": ModelType(cosmos3_edge, "native resolution"),
    "hyperclovax_vision_v2": ModelType(hyperclovax_vision_v2, "native resolution, window attention"),
}
