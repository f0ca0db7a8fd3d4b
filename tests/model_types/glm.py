"""GLM's vision-language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .base import ModelType, byte_level_tokenizer, ends, grid_processors, merged, save, shrink, token_ids

TOKENS = [
    "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>", "<|image|>",
    "<|begin_of_video|>", "<|end_of_video|>", "<|video|>",
]  # fmt: skip
# No token ends a turn: the next turn's opening does, and `<|endoftext|>` ends the last one. THINK: what stands before an answer without reasoning.
TEMPLATE = """\
{{- '[gMASK]<sop>' -}}
{%- for m in messages -%}
{{- '<|' + m.role + '|>\\n' -}}{%- if m.role == 'assistant' -%}{{- 'THINK' -}}{%- endif -%}
{%- if m.content is string -%}{{- m.content -}}{%- else -%}
{%- for p in m.content -%}
{%- if p.type == 'image' -%}{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"""
PLAIN, THINKING = TEMPLATE.replace("THINK", ""), TEMPLATE.replace("THINK", "<think></think>\\n")
IDS = {
    "image_token_id": "<|image|>", "video_token_id": "<|video|>", "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>",
}  # fmt: skip
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}}
TEXT = {"num_attention_heads": 2, "num_key_value_heads": 1} | ROPE
TOWER = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}


def _glm(folder: Path, name: str, processor: str, images: str, template: str, text: dict[str, Any], vision: dict[str, Any], model: str = "", **top: Any) -> None:
    """name: of the config class. processor, images: what the classes of the processor and of its image processor begin with."""
    import transformers as t

    words = byte_level_tokenizer(TOKENS, "<|endoftext|>")
    words.add_tokens(["<think>", "</think>"])
    parts = grid_processors(f"{images}ImageProcessor", f"{images}VideoProcessor", **top)
    made = getattr(t, f"{processor}Processor")(**parts, tokenizer=words, chat_template=template)
    end = [words.eos_token_id, *words.convert_tokens_to_ids(["<|user|>", "<|observation|>"])]
    config = shrink(
        getattr(t, f"{name}Config"), text_config=merged({"vocab_size": len(words)} | ends(words), text), vision_config=TOWER | vision, **token_ids(words, **IDS),
    )  # fmt: skip
    save(folder, getattr(t, f"{model or name}ForConditionalGeneration"), config, made, words, eos=end)


def glm4v(folder: Path) -> None:
    _glm(folder, "Glm4v", "Glm4v", "Glm4v", PLAIN, TEXT, {})


def glm4v_moe(folder: Path) -> None:
    _glm(folder, "Glm4vMoe", "Glm4v", "Glm4v", THINKING, TEXT, {})


def glm46v(folder: Path) -> None:
    _glm(folder, "Glm46V", "Glm46V", "Glm46V", THINKING, TEXT, {})


def glmga(folder: Path) -> None:
    _glm(folder, "Glmga", "Glm46V", "Glmga", THINKING, TEXT, {}, model="Glm46V")


def glm_ocr(folder: Path) -> None:
    _glm(folder, "GlmOcr", "Glm46V", "Glm46V", PLAIN, TEXT, {})


def glm5_next(folder: Path) -> None:
    """Linear attention beside latent attention with an indexer, hyper-connections, experts with a shared one."""
    text = {
        "layer_types": ["linear_attention", "indexed_attention"], "mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "full"],
        "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "v_head_dim": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 0, "index_topk": 512,
        "index_kpool": 2, "index_n_heads": 2, "linear_num_heads": 2, "hc_mult": 2, "hc_sinkhorn_iters": 3,
    }  # fmt: skip
    _glm(folder, "Glm5Next", "Glm5Next", "Glm5Next", THINKING, text, {"projection_intermediate_size": 32}, min_image_tokens=1, max_image_tokens=16)


TYPES = {
    "glm4v": ModelType(glm4v, "native resolution", group="glm4_6v"),
    "glm4v_moe": ModelType(glm4v_moe, "mixture of experts"),
    "glm46v": ModelType(glm46v, "native resolution"),
    "glmga": ModelType(glmga, "native resolution"),
    "glm_ocr": ModelType(glm_ocr, "native resolution", group="glm_ocr"),
    "glm5_next": ModelType(glm5_next, "hybrid linear attention, mixture of experts, hyper-connections"),
}
