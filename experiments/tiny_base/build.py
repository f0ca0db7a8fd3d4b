"""Builds the untrained tiny model: Qwen2-VL's architecture, a tokenizer of its own, random weights.

    python experiments/tiny_base/build.py outputs/tiny_untrained

`mmft model=tiny model.path=... data=scenes lora=none` then trains it: run.sh holds the exact commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from random import Random

SEED = 0
SPECIAL = (
    "<|endoftext|>",  # padding, and never the end of an answer
    "<|im_start|>",
    "<|im_end|>",  # ends every turn, so also an answer
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
SIDE, PATCH, MERGE = 84, 14, 2  # 3 x 3 image tokens: one for each cell of the drawing's grid
# The paper is light: centred on it, an empty patch is near zero and what is drawn stands out. With CLIP's values the
# same model learned places and sizes but no color in the same time.
MEAN, STD = (0.96, 0.96, 0.96), (0.3, 0.3, 0.3)
# Renders what Qwen2-VL's own template renders, except that no system turn is added.
TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}"""


def texts() -> list[str]:
    """What the tokenizer's words are counted on: the drawn sets' questions and answers, and plain lists of the items,
    in which a shape's word also stands at the start."""
    from mmft.data.sources.drawing import random_scene
    from mmft.data.sources.scenes import QUESTIONS, several_turns
    from mmft.data.sources.shapes import COMPARISONS, comparison

    lines = ["user\n", "assistant\n", "system\n"] * 2000 + [question for question, _ in COMPARISONS] * 100
    for number in range(4000):
        rng = Random(f"words/{number}")
        scene = random_scene(rng, SIDE, 1, 4)
        items = "; ".join(f"{item.kind}: {item.color}, {item.place}" for item in scene.items)
        lines += [text for turn in several_turns(rng, scene, len(QUESTIONS)) for text in turn]
        lines += ["Write the inventory.", items, *(comparison(rng, scene) or ())]
    return lines


def tokenizer():
    """A byte-level BPE with Qwen2's splitting rules: every drawn word is one token, anything else falls to bytes."""
    from tokenizers import Tokenizer, models, trainers
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=2000, min_frequency=50, initial_alphabet=sorted(ByteLevel.alphabet()), show_progress=False
    )
    learned.train_from_iterator(texts(), trainer)
    model = json.loads(learned.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL),
        model_max_length=2048,
    )


def processor():
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": SIDE * SIDE}
    settings = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    settings |= {"image_mean": list(MEAN), "image_std": list(STD)}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**settings),
        chat_template=TEMPLATE,
    )


def config(words, text: dict | None = None, vision: dict | None = None):
    """The model's config; `words` is the tokenizer, whose ids the config repeats."""
    from transformers import Qwen2VLConfig

    def number(token: str) -> int:
        return words.convert_tokens_to_ids(token)

    text = {
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.06,
        "max_position_embeddings": 2048,
        # time, height and width take turns over the 16 frequencies: in three blocks, width would get only the slow ones
        "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1] * 16},
        "bos_token_id": number("<|endoftext|>"),
        "eos_token_id": number("<|im_end|>"),
        "pad_token_id": number("<|endoftext|>"),
        "tie_word_embeddings": True,
    } | (text or {})
    vision = {
        "depth": 2,
        "embed_dim": 128,
        "num_heads": 4,
        "mlp_ratio": 4,
        "initializer_range": 0.06,
        "hidden_size": text["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
    } | (vision or {})
    return Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number("<|image_pad|>"),
        video_token_id=number("<|video_pad|>"),
        vision_start_token_id=number("<|vision_start|>"),
        vision_end_token_id=number("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def model(settings):
    import torch
    from transformers import GenerationConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(SEED)
    made = Qwen2VLForConditionalGeneration(settings)
    made.generation_config = GenerationConfig(
        bos_token_id=settings.text_config.bos_token_id,
        eos_token_id=settings.text_config.eos_token_id,
        pad_token_id=settings.text_config.pad_token_id,
        do_sample=False,
    )
    return made


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    made = processor()
    made.save_pretrained(out)
    untrained = model(config(made.tokenizer))
    untrained.to(torch.bfloat16).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in untrained.parameters()):,} parameters, {len(made.tokenizer)} tokens")


if __name__ == "__main__":
    main()
