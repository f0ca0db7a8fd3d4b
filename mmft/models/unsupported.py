"""Model types of transformers that mmft refuses, each with the reason: they would be trained or used wrongly, or are no chat or caption models."""

from __future__ import annotations

_RENAMED = "when peft loads an adapter for it, transformers renames some of its layers, and those adapters stay random"
# model type -> what is wrong, as the end of "a TYPE is not supported: ..."; a way on follows if there is one
UNSUPPORTED: dict[str, str] = {
    "deepseek_ocr2": _RENAMED, "inkling2": _RENAMED, "inkling2_loop": _RENAMED, "mistral_large4": _RENAMED,
    "mistral4": "it is a language model without a vision part; Mistral Small 4 with its vision part is a mistral3",
    "unlimited_ocr": "in generation a token reads the prompt and the last 128 tokens of the answer, in training the whole answer before it",
    "hunyuan_vl": "transformers numbers the images of a whole batch for its rotary positions, so a row's result depends on the rows before it",
}
