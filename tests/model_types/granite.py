"""IBM's lines: Granite Vision 4 with features for several layers, and Granite Docling with tiles of a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import SIDE, ModelType, byte_level_tokenizer, ends, save

# Written from the documentation of Granite: the role between two tokens, a token behind every turn.
GRANITE = """\
{%- for m in messages -%}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<image>\\n' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|end_of_text|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}"""
MULTIPLIERS = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.25}


def granite4_vision(folder: Path) -> None:
    """Five groups of image features, each added before a layer of its own; small Q-Formers make 2 x 2 of the 4 x 4 patches of a tile."""
    import transformers as t

    words = _words(["<image>"])
    grid = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    processor = t.Granite4VisionProcessor(
        image_processor=t.LlavaNextImageProcessor(size={"height": SIDE, "width": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=grid),
        tokenizer=words, patch_size=14, vision_feature_select_strategy="full", downsample_rate="1/2", chat_template=GRANITE,
    )  # fmt: skip
    tower = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE, "patch_size": 14}
    config = t.Granite4VisionConfig(
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **tower},
        text_config=TEXT | ends(words) | MULTIPLIERS | {"vocab_size": len(words), "num_hidden_layers": 5},
        qformer_config={"model_type": "blip_2_qformer", "num_hidden_layers": 1, "intermediate_size": 64, "cross_attention_frequency": 1, "use_qformer_text_input": False},
        image_token_index=words.convert_tokens_to_ids("<image>"), image_grid_pinpoints=grid, downsample_rate="1/2", deepstack_layer_map=[[1, 0]],
        spatial_vision_layer=-1, spatial_target_layers=[1, 2, 3, 4], vision_feature_select_strategy="full", vision_feature_layer=-1,
    )  # fmt: skip
    save(folder, t.Granite4VisionForConditionalGeneration, config, processor, words)


def granite_docling(folder: Path) -> None:
    """A page in tiles of 32 pixels beside the whole; one layer of the tower is handed to the language model."""
    import transformers as t

    places = [f"<row_{r}_col_{c}>" for r in range(1, 5) for c in range(1, 5)]
    words = _words(["<image>", "<fake_token_around_image>", "<global-img>", *places])
    processor = t.GraniteDoclingProcessor(
        image_processor=t.GraniteDoclingImageProcessor(size={"height": 32, "width": 32}, max_patches=4), tokenizer=words, image_seq_len=4, chat_template=GRANITE
    )
    vision = {
        "hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "out_hidden_size": 32,
        "scale_factor": 2, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = t.GraniteDoclingConfig(
        vision_config=vision, text_config=TEXT | ends(words) | MULTIPLIERS | {"vocab_size": len(words), "tie_word_embeddings": True},
        image_token_id=words.convert_tokens_to_ids("<image>"), density_router_hidden_size=8, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    save(folder, t.GraniteDoclingForConditionalGeneration, config, processor, words)


def _words(special: list[str]) -> Any:
    return byte_level_tokenizer(["<|start_of_role|>", "<|end_of_role|>", *special], "<|end_of_text|>", "<|pad|>", "<|end_of_text|>")


TYPES = {
    "granite4_vision": ModelType(granite4_vision, "tiled, Q-Former, deepstack"),
    "granite_docling": ModelType(granite_docling, "tiled, deepstack"),
}
