"""Puts a trained tiny model where mmft ships it: weights in bf16, the settings build.py gave it, a model card.

    python experiments/tiny_base/export.py outputs/tiny_stage2/model mmft/assets/tiny
"""

from __future__ import annotations

import sys
from pathlib import Path

from build import model as untrained

CARD = """\
# tiny

A vision-language model of {parameters:,} parameters with Qwen2-VL's architecture, made to be fine-tuned within a
minute on two CPU cores: the built-in default of mmft (`model=tiny`). It knows one world: light paper with one to four
shapes (eight kinds, eight colors, two sizes) in the cells of a 3 x 3 grid. It describes such a picture without
mistakes and answers plain questions about it less surely; it knows nothing else, no photos and no other words.

Pretrained by mmft itself on pictures that mmft draws (`data=scenes lora=none`). How, how well, and what failed:
experiments/tiny_base in the source tree. Image tokens: one for 28 x 28 pixels, pictures are brought to about 84 x 84.
Tokenizer: byte-level BPE, {tokens} tokens, trained on the drawn captions. No system prompt. License: Apache-2.0.
"""


def main() -> None:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    processor = AutoProcessor.from_pretrained(source)
    trained = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16)
    trained.generation_config = untrained(trained.config).generation_config  # not the run's max_new_tokens
    trained.save_pretrained(out)
    processor.save_pretrained(out)
    parameters = sum(p.numel() for p in trained.parameters())
    card = CARD.format(parameters=parameters, tokens=len(processor.tokenizer))
    (out / "README.md").write_text(card, encoding="utf-8", newline="\n")
    print(f"{out}: {parameters:,} parameters, {(out / 'model.safetensors').stat().st_size:,} bytes of weights")


if __name__ == "__main__":
    main()
