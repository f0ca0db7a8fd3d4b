"""GOT-OCR 2 and its relatives: a SAM tower whose map two convolutions shrink, or InternVL's tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from small_models import TEXT, TOWER

from .base import CHATML, SIDE, ModelType, ends, qwen_tokenizer, save

# Written after the prompt that GOT-OCR 2's processor builds; the checkpoint has no template.
GOT = """\
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\\nYou should follow the instructions carefully and explain your answers in detail.<|im_end|>' -}}{%- endif -%}
{%- for m in messages -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- for p in m.content -%}{%- if p.type == 'image' -%}{{- '<img>IMAGE_PLACE</img>\\n' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}
{{- '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
SAM = {"hidden_size": 24, "output_channels": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "window_size": 4, "mlp_dim": 48}


def got_ocr2(folder: Path) -> None:
    """256 features for every image, as its processor writes them: a map of 64 x 64 patches, shrunk to 16 x 16."""
    _got(folder, "GotOcr2", "<imgpad>", 256, {"image_size": 128, "patch_size": 2, "global_attn_indexes": []})


def pp_chart2table(folder: Path) -> None:
    """The template itself writes all the tokens of an image; the processor adds none."""
    _got(folder, "PPChart2Table", "<imgpad>" * 16, 16, {"image_size": 64, "patch_size": 4, "global_attn_indexes": [1]})


def _got(folder: Path, family: str, place: str, features: int, vision: dict[str, Any]) -> None:
    """place: what the template writes for an image. features: of each image."""
    import transformers as t

    words = qwen_tokenizer(["<img>", "</img>", "<imgpad>"])
    side = {"height": vision["image_size"], "width": vision["image_size"]}
    processor = getattr(t, f"{family}Processor")(
        image_processor=getattr(t, f"{family}ImageProcessor")(size=side), tokenizer=words, chat_template=GOT.replace("IMAGE_PLACE", place)
    )
    config = getattr(t, f"{family}Config")(
        vision_config={**SAM, **vision}, text_config=TEXT | ends(words) | {"model_type": "qwen2", "vocab_size": len(words), "tie_word_embeddings": True},
        image_token_index=words.convert_tokens_to_ids("<imgpad>"), image_seq_length=features,
    )  # fmt: skip
    save(folder, t.GotOcr2ForConditionalGeneration, config, processor, words)


def qianfan_ocr(folder: Path) -> None:
    """InternVL's tower and tiles; `<image>` in the text stands for tokens of another name."""
    import transformers as t

    words = qwen_tokenizer(["<image>"], start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    processor = t.QianfanOCRProcessor(
        image_processor=t.GotOcr2ImageProcessor(size={"height": SIDE, "width": SIDE}, min_patches=1, max_patches=2, crop_to_patches=True),
        tokenizer=words, image_seq_length=4, chat_template=CHATML.replace("IMAGE_PLACE", "<image>\\n"),
    )  # fmt: skip
    config = t.QianfanOCRConfig(
        vision_config=TOWER | {"image_size": [SIDE, SIDE], "patch_size": [14, 14]},
        text_config=TEXT | ends(words) | {"model_type": "qwen3", "head_dim": 8, "vocab_size": len(words)},
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"), image_seq_length=4,
    )  # fmt: skip
    save(folder, t.QianfanOCRForConditionalGeneration, config, processor, words)


TYPES = {
    "got_ocr2": ModelType(got_ocr2, "dense, SAM tower", group="got_ocr2"),
    "pp_chart2table": ModelType(pp_chart2table, "dense, SAM tower"),
    "qianfan_ocr": ModelType(qianfan_ocr, "tiled"),
}
