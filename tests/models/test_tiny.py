"""The shipped tiny model: its parts agree with each other, and its weights still do what they were shipped for."""

import importlib.util
from random import Random

import pytest
from places import ROOT

from mmft.data.sources.drawing import COLORS, KINDS, draw, random_scene
from mmft.data.sources.scenes import ALL_PLACES, _caption

FOLDER = ROOT / "mmft" / "assets" / "tiny"
BUILD = ROOT / "experiments" / "tiny_base" / "build.py"


@pytest.fixture(scope="module")
def processor():
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


def chat(question, answer=None):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    return messages + ([{"role": "assistant", "content": [{"type": "text", "text": answer}]}] if answer else [])


def test_size(model):
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 8_000_000
    assert 1_000_000 < sum(p.numel() for p in model.parameters()) < 5_000_000


def test_tokens(processor, model):
    tokenizer, config = processor.tokenizer, model.config
    for token, number in {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
        "<|im_end|>": config.text_config.eos_token_id,
        "<|endoftext|>": config.text_config.pad_token_id,
    }.items():
        assert tokenizer.convert_tokens_to_ids(token) == number
        assert tokenizer(token).input_ids == [number]
    assert len(tokenizer) == config.text_config.vocab_size
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == model.generation_config.eos_token_id
    for word in (*KINDS, *COLORS, *" ".join(ALL_PLACES).split()):
        assert len(tokenizer(" " + word).input_ids) == 1, word
    strange = "Zwölf 猫, 3.5 €\n"
    assert tokenizer.decode(tokenizer(strange).input_ids) == strange


def test_template(processor):
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor.apply_chat_template(chat("Q?", "A."), tokenize=False) == (
        f"<|im_start|>user\n{picture}Q?<|im_end|>\n<|im_start|>assistant\nA.<|im_end|>\n"
    )
    asked = f"<|im_start|>user\n{picture}Q?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.apply_chat_template(chat("Q?"), tokenize=False, add_generation_prompt=True) == asked
    text = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert processor.apply_chat_template(text, tokenize=False) == "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"


def test_captions_of_unseen_scenes(processor, model):
    """Perception is what the adapter builds on; measured 1.00 over 60 scenes when the weights were shipped."""
    import torch

    processor.tokenizer.padding_side = "left"
    scenes = [random_scene(Random(f"held out/{n}"), 168, 1, 4) for n in range(20)]
    turns = [_caption(Random(0), scene) for scene in scenes]
    texts = [processor.apply_chat_template(chat(q), tokenize=False, add_generation_prompt=True) for q, _ in turns]
    batch = processor(text=texts, images=[draw(s) for s in scenes], padding=True, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == [9] * 20  # 84 x 84: 3 x 3 tokens
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=64)
    said = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert sum(text == answer for text, (_, answer) in zip(said, turns, strict=True)) >= 18


def test_the_shipped_tokenizer_is_the_one_the_script_builds(processor):
    spec = importlib.util.spec_from_file_location("tiny_base_build", BUILD)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    made = build.processor()
    assert made.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert made.chat_template == processor.chat_template
    assert made.image_processor.size == processor.image_processor.size
