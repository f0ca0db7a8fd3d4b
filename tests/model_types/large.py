"""Large mixtures of experts: Kimi, MiniMax, Step, Inkling, Nemotron."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import CHATML, ModelType, byte_level_tokenizer, ends, grid_processors, save, shrink, token_ids

TOWER = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}


def kimi_k25(folder: Path) -> None:
    """DeepSeek-V3's latent attention and experts behind a tower of native resolution."""
    import transformers as t

    tokens = ["<|im_user|>", "<|im_assistant|>", "<|im_system|>", "<|im_middle|>", "<|media_begin|>", "<|media_content|>", "<|media_end|>", "<|media_pad|>",
              "<|kimi_k25_video_placeholder|>"]  # fmt: skip
    words = byte_level_tokenizer(tokens, "<|im_end|>", "[PAD]", "[BOS]")
    words.add_tokens(["<think>", "</think>"])
    template = """\
{%- for m in messages -%}
{{- '<|im_' + m.role + '|>' + m.role + '<|im_middle|>' -}}{%- if m.role == 'assistant' -%}{{- '<think></think>' -}}{%- endif -%}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for p in m.content -%}
{%- if p.type == 'image' -%}{{- '<|media_begin|>image<|media_content|><|media_pad|><|media_end|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_assistant|>assistant<|im_middle|>' -}}{%- endif -%}"""
    images = t.Kimi_K25ImageProcessor(max_patches=64, size={"max_height": 1024, "max_width": 1024})
    made = t.Kimi_K25Processor(image_processor=images, video_processor=t.Kimi_K25VideoProcessor(), tokenizer=words, chat_template=template)
    text = {
        "vocab_size": len(words), "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8,
        "num_mtp_layers": 0,
    }  # fmt: skip
    ids = {"image_token_id": "<|media_pad|>", "video_token_id": "<|kimi_k25_video_placeholder|>", "vision_start_token_id": "<|media_begin|>", "vision_end_token_id": "<|media_end|>"}
    config = shrink(
        t.Kimi_K25Config, text_config=text | ends(words), vision_config=TOWER | {"pos_emb_height": 8, "pos_emb_width": 8}, projection_hidden_size=16,
        tie_word_embeddings=False, **token_ids(words, **ids),
    )  # fmt: skip
    save(folder, t.Kimi_K25ForConditionalGeneration, config, made, words)


def minimax_m3_vl(folder: Path) -> None:
    """Attention to selected blocks beside full attention; the tokens of an image carry MiniMax's brackets."""
    import transformers as t

    tokens = ["]~b]", "]~!b[", "]<]image[>[", "]<]video[>[", "]<]start of image[>[", "]<]end of image[>["]
    words = byte_level_tokenizer(tokens, "[e~[", "]!p~[", "]!d~[")
    template = """\
{{- ']~!b[' -}}
{%- for m in messages -%}
{{- ']~b]' + ('ai' if m.role == 'assistant' else m.role) + '\\n' -}}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- ']<]image[>[' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{%- endif -%}
{{- '[e~[\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ']~b]ai\\n' -}}{%- endif -%}"""
    parts = grid_processors("MiniMaxM3VLImageProcessor", "MiniMaxM3VLVideoProcessor")
    text = {
        "vocab_size": len(words), "dense_intermediate_size": 32, "shared_intermediate_size": 16, "intermediate_size": 16, "rotary_dim": 4, "index_n_heads": 2, "index_block_size": 16,
        "index_topk_blocks": 64, "layer_types": ["full_attention", "minimax_m3_sparse"], "mlp_layer_types": ["dense", "sparse"],
    }  # fmt: skip
    config = shrink(
        t.MiniMaxM3VLConfig, text_config=text | ends(words), vision_config=TOWER | {"image_size": 112}, projector_hidden_size=32,
        **token_ids(words, image_token_index="]<]image[>[", video_token_index="]<]video[>["),
    )  # fmt: skip
    save(folder, t.MiniMaxM3SparseForConditionalGeneration, config, t.MiniMaxM3VLProcessor(**parts, tokenizer=words, chat_template=template), words)


def step3p7(folder: Path) -> None:
    """The picture whole and in tiles; sliding and full attention."""
    import transformers as t

    tokens = ["<|im_start|>", "<im_patch>", "<im_start>", "<im_end>", "<patch_start>", "<patch_end>", "<patch_newline>"]
    words = byte_level_tokenizer(tokens, "<|im_end|>", "<|pad|>")
    images = t.Step3p7ImageProcessor(size={"height": 56, "width": 56}, patch_size=56)
    made = t.Step3p7Processor(image_processor=images, tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<im_patch>"))
    text = {
        "vocab_size": len(words), "share_expert_dim": 16, "layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"], "sliding_window": 512,
        "num_sliding_attention_heads": 4, "query_pre_attn_scalar": 8, "per_layer_config": None, "rope_parameters": None,
    }  # fmt: skip
    vision = TOWER | {"image_size": 56, "mlp_ratio": 2.0, "max_position_embeddings": 16}
    config = shrink(t.Step3p7Config, text_config=text | ends(words), vision_config=vision, **token_ids(words, image_token_id="<im_patch>"))
    save(folder, t.Step3p7ForConditionalGeneration, config, made, words)


INKLING = ["<|content_image|>", "<|content_audio_input|>", "<|unused_200053|>", "<|unused_200054|>", "<|message_user|>", "<|message_model|>", "<|message_system|>", "<|content_text|>"]
INKLING_TEMPLATE = """\
{%- for m in messages -%}
{%- set role = 'model' if m.role == 'assistant' else m.role -%}
{%- for p in m.content -%}
{%- if p.type == 'image' -%}{{- '<|message_' + role + '|><|content_image|><|unused_200054|><|end_message|>' -}}
{%- else -%}{{- '<|message_' + role + '|><|content_text|>' + p.text + '<|end_message|>' -}}{%- endif -%}
{%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|message_model|><|content_text|>' -}}{%- endif -%}"""


def _inkling_text(words: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(words), "unpadded_vocab_size": len(words), "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "sliding_window_size": 512, "d_rel": 4,
        "rel_extent": 64, "layer_types": ["hybrid_sliding", "hybrid"], "moe_intermediate_size": 16,
    } | ends(words)  # fmt: skip


def inkling_mm_model(folder: Path) -> None:
    """Patches of 40 pixels without a transformer tower; relative logits and short convolutions in the language model."""
    import transformers as t

    words = byte_level_tokenizer(INKLING, "<|end_message|>", "<|pad|>")
    made = t.InklingProcessor(feature_extractor=t.InklingFeatureExtractor(), image_processor=t.InklingImageProcessor(), tokenizer=words, chat_template=INKLING_TEMPLATE)
    text = _inkling_text(words) | {"mlp_layer_types": ["dense", "sparse"], "intermediate_size": 32, "logits_mup_width_multiplier": 1.0}
    ids = {"image_token_id": "<|unused_200054|>", "audio_token_id": "<|unused_200053|>", "image_bos_token_id": "<|content_image|>", "audio_bos_token_id": "<|content_audio_input|>"}
    config = shrink(
        t.InklingConfig, text_config=text, vision_config={"hidden_size": 16, "num_attention_heads": 2, "text_hidden_size": 32}, audio_config={"text_hidden_size": 32, "n_mel_bins": 8, "mel_vocab_size": 16},
        **token_ids(words, **ids),
    )  # fmt: skip
    save(folder, t.InklingForConditionalGeneration, config, made, words)


def nemotron_h_omni(folder: Path) -> None:
    """Mamba layers beside attention and experts, behind a RADIO tower; without its audio part."""
    import transformers as t

    words = byte_level_tokenizer(["<|im_start|>", "<image>", "<video>", "<so_embedding>", "<so_start>", "<so_end>", "<img>", "</img>"], "<|im_end|>", "<unk>", "<s>")
    parts = {
        "image_processor": t.NemotronH_Omni_Reasoning_V3ImageProcessor(min_num_patches=4, max_num_patches=36),
        "video_processor": t.NemotronH_Omni_Reasoning_V3VideoProcessor(),
        "feature_extractor": t.ParakeetFeatureExtractor(feature_size=16),
    }
    made = t.NemotronH_Omni_Reasoning_V3Processor(**parts, tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<image>\\n"))
    text = {
        "vocab_size": len(words), "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"], "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 8,
        "n_groups": 2, "chunk_size": 16, "moe_shared_expert_intermediate_size": 16, "use_mamba_kernels": False,
    }  # fmt: skip
    vision = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 64, "max_img_size": 128, "mlp_ratio": 2.0, "patch_dim": None, "video_patch_dim": None}
    ids = token_ids(words, image_token_id="<image>", video_token_id="<video>", audio_token_id="<so_embedding>")
    config = shrink(
        t.NemotronH_Omni_Reasoning_V3_Config, text_config=text | ends(words), vision_config=vision, projector_hidden_size=32, vision_hidden_size=16, audio_config=None, **ids
    )
    save(folder, t.NemotronH_Omni_Reasoning_V3, config, made, words)


TYPES = {
    "kimi_k25": ModelType(kimi_k25, "mixture of experts, native resolution", group="kimi_k25"),
    "minimax_m3_vl": ModelType(minimax_m3_vl, "mixture of experts, sparse attention"),
    "step3p7": ModelType(step3p7, "mixture of experts, tiled"),
    "inkling_mm_model": ModelType(inkling_mm_model, "mixture of experts, short convolutions"),
    "nemotron_h_omni": ModelType(nemotron_h_omni, "hybrid Mamba, mixture of experts"),
}
