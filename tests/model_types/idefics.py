"""Hugging Face's vision-language models: SmolVLM, Idefics2, Idefics3."""

from __future__ import annotations

from pathlib import Path

import small_models
from small_models import SMOL, TEXT, TOWER

from .base import ModelType, ends, llama_tokenizer, qwen_tokenizer, save

# Idefics2's turns, as its documentation describes them.
IDEFICS2 = SMOL.replace("{{- '<|im_start|>' -}}\n", "")


def idefics2(folder: Path) -> None:
    """A resampler turns every picture into four features; Mistral reads them between fake tokens."""
    import transformers as t

    words = llama_tokenizer()
    processor = t.Idefics2Processor(
        image_processor=t.Idefics2ImageProcessor(size={"shortest_edge": 28, "longest_edge": 56}, do_image_splitting=False), tokenizer=words, image_seq_len=4,
        chat_template=IDEFICS2,
    )  # fmt: skip
    text = TEXT | ends(words) | {"model_type": "mistral", "vocab_size": len(words), "sliding_window": None}
    perceiver = {
        "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2, "resampler_head_dim": 8, "num_key_value_heads": 1,
    }  # fmt: skip
    config = t.Idefics2Config(
        vision_config=TOWER, perceiver_config=perceiver, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"),
    )  # fmt: skip
    save(folder, t.Idefics2ForConditionalGeneration, config, processor, words, eos=[words.eos_token_id, words.convert_tokens_to_ids("<end_of_utterance>")])


def idefics3(folder: Path) -> None:
    """The picture in tiles of 16 pixels and whole, four features each; SmolVLM's predecessor."""
    import transformers as t

    rows = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    words = qwen_tokenizer(["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>", *rows])
    words.eos_token = "<end_of_utterance>"
    processor = t.Idefics3Processor(
        image_processor=t.Idefics3ImageProcessor(size={"longest_edge": 32}, max_image_size={"longest_edge": 16}), tokenizer=words, image_seq_len=4,
        chat_template=SMOL,
    )  # fmt: skip
    config = t.Idefics3Config(
        vision_config=TOWER | {"image_size": 16, "patch_size": 4}, text_config=TEXT | ends(words) | {"model_type": "llama", "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<image>"), scale_factor=2, pad_token_id=words.pad_token_id,
    )  # fmt: skip
    save(folder, t.Idefics3ForConditionalGeneration, config, processor, words)


TYPES = {
    "smolvlm": ModelType(small_models.smolvlm, "tiled", group="smolvlm"),
    "idefics2": ModelType(idefics2, "resampler", group="idefics2"),
    "idefics3": ModelType(idefics3, "tiled"),
}
