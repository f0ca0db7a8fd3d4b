"""Builds a model of a published configuration's true shape with random weights, for runs that need no trained weights.

    python experiments/true_shapes/build.py CONFIG_FOLDER OUT [--device cuda]

CONFIG_FOLDER holds config.json, preprocessor_config.json and the tokenizer's files, where the model has them. Besides the vision-language
models a language model (qwen2) and a vision tower (clip) can be built, the two parts that `mmft assemble` puts together. The weights are
bf16, seeded, and saved in shards; what a run on them shows is memory and time, never quality.
"""

from __future__ import annotations

import argparse
import time

# Renders what Qwen2-VL's own template renders, except that no system turn is added; texts as Qwen1.5's does.
CHAT = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- for part in ([{'type': 'text', 'text': message.content}] if message.content is string else message.content) -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def processor_of(folder: str, config):
    """The processor, tokenizer or image processor that goes with the model."""
    from transformers import AutoImageProcessor, AutoTokenizer, Blip2Processor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    if config.model_type == "clip":
        return AutoImageProcessor.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if config.model_type == "qwen2":
        tokenizer.chat_template = CHAT
        return tokenizer
    images = AutoImageProcessor.from_pretrained(folder)
    if config.model_type == "blip-2":
        return Blip2Processor(images, tokenizer, num_query_tokens=config.num_query_tokens)
    return Qwen2VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("out")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    started = time.time()
    config = AutoConfig.from_pretrained(args.folder)
    kind = {"qwen2": AutoModelForCausalLM, "clip": AutoModel}.get(config.model_type, AutoModelForImageTextToText)
    torch.manual_seed(0)
    with torch.device(args.device):
        model = kind.from_config(config, dtype=torch.bfloat16)
    processor = processor_of(args.folder, config)
    if config.model_type != "clip":
        pad = getattr(processor, "tokenizer", processor).pad_token_id
        end = getattr(config.get_text_config(), "eos_token_id", None)
        model.generation_config.eos_token_id = [end if end is not None else getattr(processor, "tokenizer", processor).eos_token_id]
        model.generation_config.pad_token_id = pad
    model.save_pretrained(args.out, max_shard_size="2GB")
    processor.save_pretrained(args.out)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters in {time.time() - started:.0f} s -> {args.out}")


if __name__ == "__main__":
    main()
