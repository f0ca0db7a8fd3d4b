"""Ovis 2: an image is read as probabilities over a visual vocabulary, whose embeddings are mixed."""

from __future__ import annotations

from pathlib import Path

from small_models import TEXT, TOWER

from .base import CHATML, SIDE, ModelType, ends, qwen_tokenizer, save


def ovis2(folder: Path) -> None:
    """Tiles beside the whole, 4 features each; the marks between them have embeddings of the visual vocabulary."""
    import transformers as t

    marks = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]
    words = qwen_tokenizer(["<IMG_ATOM>", *marks, "<image>"])
    processor = t.Ovis2Processor(
        image_processor=t.Ovis2ImageProcessor(size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4), tokenizer=words,
        image_seq_length=4, chat_template=CHATML.replace("IMAGE_PLACE", "<image>\\n"),
    )  # fmt: skip
    config = t.Ovis2Config(
        vision_config=TOWER | {"vocab_size": 40, "hidden_stride": 2, "num_visual_indicator_tokens": 5},
        text_config=TEXT | ends(words) | {"model_type": "qwen2", "vocab_size": len(words), "tie_word_embeddings": True},
        image_token_id=words.convert_tokens_to_ids("<IMG_ATOM>"), visual_indicator_token_ids=words.convert_tokens_to_ids(marks), vocab_size=len(words),
        hidden_size=32,
    )  # fmt: skip
    save(folder, t.Ovis2ForConditionalGeneration, config, processor, words)


TYPES = {"ovis2": ModelType(ovis2, "tiled, visual vocabulary", group="ovis2")}
