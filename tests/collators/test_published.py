"""Token counts and masks with the true vocabularies and image settings of ../shared/published, counted by hand.

No chat templates are published there: those of small_models.py, which write what the models' own write, stand in.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from places import shared
from small_models import CHATML, QWEN

from mmft.collators.base import IGNORE
from mmft.collators.caption import CaptionCollator
from mmft.collators.chat import ChatCollator
from mmft.data.sample import Sample, assistant_turn, user_turn
from mmft.models.families.blip2 import Blip2
from mmft.models.families.llava import Llava
from mmft.models.families.qwen2vl import Qwen2VL


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("published")
    for width, height in ((280, 280), (640, 480), (56, 28), (10, 1000)):
        Image.new("RGB", (width, height), (200, 30, 30)).save(folder / f"{width}x{height}.png")
    return folder


def row(pictures, question: str, answer: str, *names: str) -> Sample:
    return Sample("row", names, [user_turn(len(names), question), assistant_turn(answer)], (answer,), str(pictures))


def tokens_and_loss(collator, sample) -> list[tuple[str, bool]]:
    batch = collator([sample])
    tokens = collator.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    return [(t, label != IGNORE) for t, label in zip(tokens, batch["labels"][0].tolist(), strict=True)]


@pytest.fixture(scope="module")
def qwen2vl():
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLProcessor, Qwen2VLVideoProcessor

    folder = shared("published/Qwen2-VL-2B-Instruct")
    processor = Qwen2VLProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=Qwen2VLVideoProcessor(), chat_template=QWEN,
    )  # fmt: skip
    return ChatCollator(
        processor=processor, family=Qwen2VL(path="x"), model_config=AutoConfig.from_pretrained(folder), end_token_ids=[151645, 151643]
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("280x280.png", 100),  # 280/28 = 10: 10 x 10
        ("640x480.png", 23 * 17),  # 640/28 = 22.86 -> 23, 480/28 = 17.14 -> 17
        ("56x28.png", 3 * 2),  # below min_pixels 3136: x sqrt(3136/1568) = 1.41, 28 -> ceil(1.41) = 2 rows, 56 -> ceil(2.83) = 3 columns
    ],
)
def test_qwen2vl_image_tokens(qwen2vl, pictures, name, count):
    sample = row(pictures, "?", "!", name)
    batch = qwen2vl([sample])
    assert (batch["input_ids"] == 151655).sum() == count
    assert qwen2vl.measure(sample).tokens == batch["input_ids"].shape[1], "also without decoding the image"


def test_qwen2vl_mask_by_hand(qwen2vl, pictures):
    got = tokens_and_loss(qwen2vl, row(pictures, "Describe the image.", "A red square.", "280x280.png"))
    system = ["<|im_start|>", "system", "Ċ", "You", "Ġare", "Ġa", "Ġhelpful", "Ġassistant", ".", "<|im_end|>", "Ċ"]
    user = ["<|im_start|>", "user", "Ċ", "<|vision_start|>", *["<|image_pad|>"] * 100, "<|vision_end|>", "Describe", "Ġthe", "Ġimage", ".",
            "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]  # fmt: skip
    answer = ["A", "Ġred", "Ġsquare", ".", "<|im_end|>"]
    assert got == [(t, False) for t in system + user] + [(t, True) for t in answer] + [("Ċ", False)]


def test_qwen2vl_ends_with_im_end_and_pads_with_endoftext(qwen2vl, pictures):
    assert qwen2vl.end_token_id == 151645 and qwen2vl.tokenizer.pad_token_id == 151643
    batch = qwen2vl([row(pictures, "?", "!", "280x280.png"), row(pictures, "?", "A dog", "280x280.png")])
    assert (batch["labels"] == 151645).sum(dim=1).tolist() == [1, 1] and not (batch["labels"] == 151643).any()


def test_qwen2vl_answer_beginning_with_a_newline(qwen2vl, pictures):
    """`assistant\\n` + `\\nA` would be one `ĊĊ` token that no prompt ends with; the border keeps it apart."""
    sample = row(pictures, "?", "\nA", "280x280.png")
    tail = tokens_and_loss(qwen2vl, sample)[-6:]
    assert tail == [("assistant", False), ("Ċ", False), ("Ċ", True), ("A", True), ("<|im_end|>", True), ("Ċ", False)]


def test_a_picture_too_long_for_qwen2vl_is_refused_by_name(qwen2vl, pictures):
    from dataclasses import replace

    from PIL import Image

    from mmft.common.errors import UserError

    Image.new("RGB", (10, 3000)).save(pictures / "thin.png")
    with pytest.raises(UserError, match="thin.png: unreadable image: .*a strip"):
        qwen2vl([replace(row(pictures, "?", "!", "thin.png"), id="thin")])


@pytest.fixture(scope="module")
def llava():
    """As the LLaVA seed assembles it: CLIP-L/336's settings and Qwen1.5's vocabulary with `<image>` added."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaProcessor

    clip = json.loads((shared("published/clip-vit-large-patch14-336") / "preprocessor_config.json").read_text())
    vision = json.loads((shared("published/clip-vit-large-patch14-336") / "config.json").read_text())["vision_config"]
    words = AutoTokenizer.from_pretrained(shared("published/Qwen1.5-4B-Chat"))
    words.add_tokens(["<image>"], special_tokens=True)
    keys = ("crop_size", "do_center_crop", "do_normalize", "do_resize", "image_mean", "image_std", "resample", "size")
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(**{k: clip[k] for k in keys}), tokenizer=words, chat_template=CHATML.replace("IMAGE_PLACE", "<image>\\n")
    )
    config = SimpleNamespace(
        vision_config=SimpleNamespace(**vision), vision_feature_select_strategy="default", image_token_id=words.convert_tokens_to_ids("<image>")
    )
    family = Llava(path="x")
    family.fix_processor(processor, config)  # the seed's processor carries none of the three counts
    return ChatCollator(processor=processor, family=family, model_config=config, end_token_ids=[151645, 151643])


@pytest.mark.parametrize("name", ["280x280.png", "640x480.png", "10x1000.png"])
def test_llava_image_tokens(llava, pictures, name):
    """336/14 = 24: 24 x 24 = 576 patches, whatever the picture; the class token is counted in and dropped again."""
    batch = llava([row(pictures, "?", "!", name)])
    assert (batch["input_ids"] == llava.image_token_id).sum() == 576
    assert tuple(batch["pixel_values"].shape) == (1, 3, 336, 336)


def test_llava_mask_by_hand(llava, pictures):
    got = tokens_and_loss(llava, row(pictures, "What is this?", "2 dogs", "280x280.png"))
    user = ["<|im_start|>", "user", "Ċ", *["<image>"] * 576, "Ċ", "What", "Ġis", "Ġthis", "?", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
    assert got == [(t, False) for t in user] + [("2", True), ("Ġdogs", True), ("<|im_end|>", True), ("Ċ", False)]


@pytest.fixture(scope="module")
def blip2():
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Blip2Processor

    folder = shared("published/blip2-opt-2.7b")
    config = AutoConfig.from_pretrained(folder)
    processor = Blip2Processor(AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), num_query_tokens=None)
    family = Blip2(path="x")
    family.fix_processor(processor, config)
    return CaptionCollator(processor=processor, family=family, model_config=config, end_token_ids=[config.text_config.eos_token_id])


def test_blip2_mask_by_hand(blip2, pictures):
    batch = blip2([row(pictures, "", "Hello world", "640x480.png")])
    # the vocabulary's own check: "Hello world" is [2, 31414, 232] with BOS; 50118 is the newline
    assert batch["input_ids"][0].tolist() == [50265] * 32 + [2, 31414, 232, 50118]
    assert batch["labels"][0].tolist() == [IGNORE] * 33 + [31414, 232, 50118]
    assert tuple(batch["pixel_values"].shape) == (1, 3, 224, 224)
    assert blip2.tokenizer.decode([50118]) == "\n"


def test_blip2_prompt_of_the_football_seed(blip2, pictures):
    sample = row(pictures, "Question: what is this? Answer:", "Messi", "280x280.png")
    ids = blip2.prompt([sample])["input_ids"][0].tolist()
    assert ids[:33] == [50265] * 32 + [2] and blip2.tokenizer.decode(ids[33:]) == "Question: what is this? Answer:"


def test_photographs_of_coco(qwen2vl, llava, blip2):
    """Real photographs: tokens follow from the size as Qwen2-VL rounds it, and every answer carries loss to its end."""
    from PIL import Image

    folder = shared("data/coco/images")
    names = sorted(p.name for p in folder.iterdir() if p.suffix == ".jpg")[:4]
    for name in names:
        width, height = Image.open(folder / name).size
        sample = row(folder, "Describe.", "A photograph of something.", name)
        batch = qwen2vl([sample])
        assert (batch["input_ids"] == 151655).sum() == round(width / 28) * round(height / 28)
        assert (batch["labels"] != IGNORE).sum() == 6  # A, photograph, of, something, ., <|im_end|>
        assert (llava([sample])["input_ids"] == llava.image_token_id).sum() == 576
        assert (blip2([sample])["input_ids"] == 50265).sum() == 32
        for collator in (qwen2vl, llava, blip2):
            assert collator.measure(sample).tokens == collator([sample])["input_ids"].shape[1]
