"""MiniCPM's lines: SigLIP patches in one sequence, merged within the tower and behind it, before Qwen3.5's hybrid language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT

from .base import CHATML, ModelType, ends, qwen_tokenizer, save

MARKS = {
    "image_token": "<|image_pad|>", "video_token": "<|video_pad|>", "image_start_token": "<image>", "image_end_token": "</image>",
    "slice_start_token": "<slice>", "slice_end_token": "</slice>", "image_id_start_token": "<image_id>", "image_id_end_token": "</image_id>",
}  # fmt: skip


def minicpmv4_6(folder: Path) -> None:
    """Slices of 32 pixels beside the whole, 4 features each."""
    import transformers as t

    words, config = _parts()
    processor = _processor(t.MiniCPMV4_6Processor, t.MiniCPMV4_6ImageProcessor, t.MiniCPMV4_6VideoProcessor, words, "16x")
    save(folder, t.MiniCPMV4_6ForConditionalGeneration, t.MiniCPMV4_6Config(**config, image_size=32), processor, words)


def minicpmv4_7(folder: Path) -> None:
    """As 4.6, with positions that lay the slices on the canvas of the whole."""
    import transformers as t

    words, config = _parts()
    processor = _processor(t.MiniCPMV4_7Processor, t.MiniCPMV4_6ImageProcessor, t.MiniCPMV4_6VideoProcessor, words, "16x")
    number = words.convert_tokens_to_ids
    ids = {f"{place}_id": number(token) for place, token in (
        ("image_start", "<image>"), ("image_end", "</image>"), ("slice_start", "<slice>"), ("slice_end", "</slice>"))}  # fmt: skip
    config = t.MiniCPMV4_7Config(**config, **ids, newline_id=words.encode("\n")[0], image_size=32)
    save(folder, t.MiniCPMV4_7ForConditionalGeneration, config, processor, words)


def minicpm_ocr(folder: Path) -> None:
    """The merger within the tower is skipped: four times the features."""
    import transformers as t

    words, config = _parts()
    processor = _processor(t.MiniCPMOcrProcessor, t.MiniCPMOcrImageProcessor, t.MiniCPMOcrVideoProcessor, words, "4x")
    save(folder, t.MiniCPMOcrForConditionalGeneration, t.MiniCPMOcrConfig(**config), processor, words)


def _parts() -> tuple[Any, dict[str, Any]]:
    words = qwen_tokenizer(**MARKS)
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4}
    text = TEXT | ends(words) | {
        "model_type": "qwen3_5_text", "vocab_size": len(words), "head_dim": 16, "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    number = words.convert_tokens_to_ids
    return words, {
        "text_config": text, "vision_config": vision, "insert_layer_id": 0, "image_token_id": number("<|image_pad|>"), "video_token_id": number("<|video_pad|>"),
        "tie_word_embeddings": True,
    }  # fmt: skip


def _processor(kind: Any, images: Any, videos: Any, words: Any, mode: str) -> Any:
    sizes = {"scale_resolution": 32, "patch_size": 4, "downsample_mode": mode, "max_slice_nums": 4}
    return kind(
        image_processor=images(**sizes), video_processor=videos(**sizes), tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<|image_pad|>\\n")
    )


TYPES = {
    "minicpmv4_6": ModelType(minicpmv4_6, "hybrid linear attention, tiled"),
    "minicpmv4_7": ModelType(minicpmv4_7, "hybrid linear attention, tiled"),
    "minicpm_ocr": ModelType(minicpm_ocr, "hybrid linear attention, tiled"),
}
