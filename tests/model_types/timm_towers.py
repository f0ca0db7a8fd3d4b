"""Types whose tower is a model of the package timm: FastVLM and Perception LM."""

from __future__ import annotations

from pathlib import Path

from small_models import TEXT

from .base import CHATML, ModelType, byte_level_tokenizer, ends, qwen_tokenizer, save

# Written from the documentation of Perception LM: the format of Llama 3.
LLAMA3 = """\
{{- bos_token -}}
{%- for m in messages -%}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<|image|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""


def perception_lm(folder: Path) -> None:
    """The picture whole and in tiles of 56 pixels; 2 x 2 patches of a tile are averaged."""
    import transformers as t

    words = byte_level_tokenizer(
        ["<|start_header_id|>", "<|end_header_id|>"], "<|eot_id|>", "<|pad|>", "<|begin_of_text|>", image_token="<|image|>", video_token="<|video|>"
    )
    processor = t.PerceptionLMProcessor(
        image_processor=t.PerceptionLMImageProcessor(tile_size=56, max_num_tiles=4), video_processor=t.PerceptionLMVideoProcessor(size={"height": 56, "width": 56}),
        tokenizer=words, patch_size=14, pooling_ratio=2, chat_template=LLAMA3,
    )  # fmt: skip
    tower = {"embed_dim": 64, "img_size": [56, 56], "depth": 2, "num_heads": 4, "global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}
    config = t.PerceptionLMConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": "vit_pe_lang_large_patch14_448", "do_pooling": False, "model_args": tower},
        text_config=TEXT | ends(words) | {"model_type": "llama", "vocab_size": len(words)}, vision_use_cls_token=True, projector_pooling_ratio=2,
        image_token_id=words.image_token_id, video_token_id=words.video_token_id,
    )  # fmt: skip
    save(folder, t.PerceptionLMForConditionalGeneration, config, processor, words)


def fast_vlm(folder: Path) -> None:
    """Convolutions shrink the picture by 64."""
    import transformers as t

    words = qwen_tokenizer(["<image>"])
    side = {"height": 256, "width": 256}
    processor = t.LlavaProcessor(
        image_processor=t.CLIPImageProcessor(size={"shortest_edge": 256}, crop_size=side), tokenizer=words, patch_size=64,
        vision_feature_select_strategy="full", num_additional_image_tokens=0, chat_template=CHATML.replace("IMAGE_PLACE", "<image>\\n"),
    )  # fmt: skip
    tower = {"layers": [1, 1, 1, 1, 1], "embed_dims": [8, 16, 32, 32, 64], "mlp_ratios": [2, 2, 2, 2, 2], "inference_mode": True}
    config = t.FastVlmConfig(
        vision_config={"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "do_pooling": True, "global_pool": "avg", "hidden_size": 128, "model_args": tower},
        text_config=TEXT | ends(words) | {"model_type": "qwen2", "vocab_size": len(words)}, image_token_index=words.convert_tokens_to_ids("<image>"), image_seq_length=16,
    )  # fmt: skip
    save(folder, t.FastVlmForConditionalGeneration, config, processor, words)


TYPES = {
    "fast_vlm": ModelType(fast_vlm, "dense, convolutional tower"),
    "perception_lm": ModelType(perception_lm, "tiled, pooled projector", group="perception_lm"),
}
