"""Boxes as model families write them: published forms, and original pixels -> text -> original pixels for all sizes."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmft.collators.box_styles import STYLES, find_style

FILE, RESIZED = (400, 200), (392, 196)
CAT = {"label": "cat", "image": 0, "box": [100.0, 50.0, 200.0, 150.0]}
DOG = {"label": "dog", "image": 0, "box": [0.0, 0.0, 400.0, 200.0]}
NOSE = {"label": "nose", "image": 0, "point": [200.0, 50.0]}

# Counted by hand: 100/400 = 0.25, 50/200 = 0.25, 200/400 = 0.5, 150/200 = 0.75; in the resized image 98, 49, 196, 147.
WRITTEN = {
    "thousandths": ("cat [250, 250, 500, 750]; dog [0, 0, 1000, 1000]", "[250, 250, 500, 750]", "[500, 250]"),
    "percent": ("cat [25, 25, 50, 75]; dog [0, 0, 100, 100]", "[25, 25, 50, 75]", "[50, 25]"),
    "unit": ("cat [0.250, 0.250, 0.500, 0.750]; dog [0.000, 0.000, 1.000, 1.000]", "[0.250, 0.250, 0.500, 0.750]", "[0.500, 0.250]"),
    "pixels": ("cat [98, 49, 196, 147]; dog [0, 0, 392, 196]", "[98, 49, 196, 147]", "[196, 49]"),
    "qwen2_vl": (
        "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(250,250),(500,750)<|box_end|>"
        "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(0,0),(999,999)<|box_end|>",
        "<|box_start|>(250,250),(500,750)<|box_end|>", "<|box_start|>(500,250)<|box_end|>",
    ),
    "qwen2_5_vl": (
        '```json\n[\n\t{"bbox_2d": [98, 49, 196, 147], "label": "cat"},\n\t{"bbox_2d": [0, 0, 392, 196], "label": "dog"}\n]\n```', "[98, 49, 196, 147]", "[196, 49]",
    ),
    "qwen3_vl": (
        '```json\n[\n\t{"bbox_2d": [250, 250, 500, 750], "label": "cat"},\n\t{"bbox_2d": [0, 0, 1000, 1000], "label": "dog"}\n]\n```', "[250, 250, 500, 750]", "[500, 250]",
    ),
    "internvl": (
        "<ref>cat</ref><box>[[250, 250, 500, 750]]</box><ref>dog</ref><box>[[0, 0, 1000, 1000]]</box>", "<box>[[250, 250, 500, 750]]</box>", "<box>[[500, 250]]</box>",
    ),
    # y before x, 1024 bins: 0.25 -> 256, 0.75 -> 768
    "paligemma": (
        "<loc0256><loc0256><loc0768><loc0512> cat ; <loc0000><loc0000><loc1023><loc1023> dog", "<loc0256><loc0256><loc0768><loc0512>", "<loc0256><loc0512>",
    ),
    "florence2": ("cat<loc_250><loc_250><loc_500><loc_750>dog<loc_0><loc_0><loc_999><loc_999>", "<loc_250><loc_250><loc_500><loc_750>", "<loc_500><loc_250>"),
}  # fmt: skip


def test_every_style_has_its_form_here():
    assert WRITTEN.keys() == STYLES.keys()


@pytest.mark.parametrize("name", STYLES)
def test_a_style_writes_the_published_form_and_reads_it(name):
    style = STYLES[name]
    numbers = [(r["label"], style.numbers(r, FILE, RESIZED)) for r in (CAT, DOG)]
    listing, box, point = WRITTEN[name]
    assert style.listing(numbers) == listing
    assert style.box(numbers[0][1]) == box
    assert style.box(style.numbers(NOSE, FILE, RESIZED)) == point
    assert style.read(listing) == numbers
    assert style.read(f"It is at {point}, look.")[0][1] == style.numbers(NOSE, FILE, RESIZED)
    assert style.read("no box, but 3 cats (2 of them big)") == []


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_pixels_survive_the_text_within_the_rounding(name, data):
    style = STYLES[name]
    file = data.draw(st.tuples(st.integers(2, 9000), st.integers(2, 9000)))
    resized = data.draw(st.tuples(st.integers(28, 4000), st.integers(28, 4000)))
    xs, ys = (sorted(data.draw(st.lists(st.floats(0, side, allow_nan=False), min_size=2, max_size=2, unique=True))) for side in file)
    region = {"label": "a cat", "image": 0, "box": [xs[0], ys[0], xs[1], ys[1]]}
    [(label, numbers)] = style.read(style.listing([("a cat", style.numbers(region, file, resized))]))
    back = style.pixels(numbers, file, resized)
    assert label == "a cat"
    for i, (before, after) in enumerate(zip(region["box"], back, strict=True)):
        steps = resized[i % 2] if style.steps is None else style.steps * 10**style.digits
        # half a step; a style whose highest number is below its number of steps loses up to a whole one at the far edge
        allowed = (1.0 if style.top is not None and before > file[i % 2] * (1 - 1.5 / steps) else 0.5) * file[i % 2] / steps
        assert abs(before - after) <= allowed + 1e-6


def test_florence_2_counts_as_its_processor_does():
    """transformers' own quantiser is asked where it is there."""
    import torch

    module = pytest.importorskip("transformers.models.florence2.processing_florence2")
    holder = type("Holder", (), {"quantize_bins": (1000, 1000)})()
    processor = module.Florence2PostProcessor
    boxes, size = [[13.7, 20.2, 333.3, 199.9]], (640, 427)
    style = STYLES["florence2"]
    bins = processor.quantize(holder, torch.tensor(boxes), size)[0].tolist()
    assert style.numbers({"label": "", "image": 0, "box": boxes[0]}, size, size) == bins
    whole = [int(v) for v in style.pixels(bins, size, size)]  # it drops what is behind the point
    assert whole == processor.dequantize(holder, torch.tensor([bins]), size)[0].tolist()


def test_answers_that_are_not_clean_are_read_as_far_as_possible():
    cut = STYLES["qwen2_5_vl"].read('```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "cat"}, {"bbox_2d": [5, 6, 7')
    assert cut == [("cat", [1, 2, 30, 40])]
    assert STYLES["qwen2_5_vl"].read('{"bbox_2d": "all", "label": 3} {"bbox_2d": [1, 2, 3]} {broken}') == []
    assert STYLES["qwen2_vl"].read("(1,2),(3,4) and (5, 6)") == [("", [1, 2, 3, 4]), ("", [5, 6])], "spelled without its tokens"
    assert STYLES["qwen2_vl"].read("<|object_ref_start|>dogs<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|><|box_start|>(5,6),(7,8)<|box_end|>") == [
        ("dogs", [1, 2, 3, 4]), ("dogs", [5, 6, 7, 8]),
    ]  # fmt: skip
    assert STYLES["internvl"].read("<ref>dogs</ref><box>[[1, 2, 3, 4], [5, 6, 7, 8]]</box>") == [("dogs", [1, 2, 3, 4]), ("dogs", [5, 6, 7, 8])]
    assert STYLES["thousandths"].read("the cat: [1, 2, 3, 4]\n- the dog [5, 6, 7, 8]") == [("the cat", [1, 2, 3, 4]), ("- the dog", [5, 6, 7, 8])]


def test_auto_follows_the_type_of_the_model():
    assert find_style("auto", "qwen2_5_vl") is STYLES["qwen2_5_vl"]
    assert find_style("auto", "qwen3_vl_moe") is STYLES["qwen3_vl"]
    assert find_style("auto", "smolvlm") is None
    assert find_style("unit", "smolvlm") is STYLES["unit"]


# --- against the processors -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collator():
    """The built-in model's collator, writing pixels of the resized image."""
    from mmft.collators.chat import ChatCollator
    from mmft.models.families.qwen2vl import Qwen2VL
    from mmft.models.load import end_token_ids, load_model

    family = Qwen2VL(path="mmft:tiny", device="cpu", boxes="qwen2_5_vl")
    loaded = load_model(family)
    return ChatCollator(processor=loaded.processor, family=family, model_config=loaded.model.config, end_token_ids=end_token_ids(family, loaded))


def sample(folder, size, region, more=()):
    from PIL import Image

    from mmft.data.sample import Sample, user_turn

    Image.new("RGB", size, "white").save(folder / "a.png")
    image = {"type": "image", **dict(more)}
    turn = user_turn(0, "Where?")
    turn["content"].insert(0, image)
    return Sample("a", ("a.png",), [turn, {"role": "assistant", "content": [{"type": "regions", "regions": [region]}]}], ("-",), str(folder))


@settings(max_examples=25, deadline=None)
@given(width=st.integers(30, 700), height=st.integers(30, 700), asked=st.sampled_from([(), (("max_pixels", 56 * 56),), (("resized_height", 112), ("resized_width", 84))]))
def test_numbers_count_the_pixels_that_the_processor_produces(collator, tmp_path_factory, width, height, asked):
    from qwen_vl_utils import smart_resize

    if max(width, height) > 3 * min(width, height):  # thinner ones the small image bounds of this model refuse
        return
    folder = tmp_path_factory.mktemp("sizes")
    region = {"label": "x", "image": 0, "box": [width / 4, height / 3, width / 2, float(height)]}
    row = sample(folder, (width, height), region, asked)
    batch = collator([row])
    images = collator.processor.image_processor
    _, rows, columns = batch["image_grid_thw"][0].tolist()
    produced = (columns * images.patch_size, rows * images.patch_size)
    keys = dict(asked)
    if "resized_height" in keys:
        wanted = smart_resize(keys["resized_height"], keys["resized_width"], images.patch_size * images.merge_size)
    else:
        low, high = images.size["shortest_edge"], keys.get("max_pixels", images.size["longest_edge"])
        wanted = smart_resize(height, width, images.patch_size * images.merge_size, min(low, high), high)
    assert produced == wanted[::-1], "the processor and qwen_vl_utils agree"
    text = collator.written(row).answer_text
    numbers = json.loads(re.search(r"\[[\d, ]+\]", text)[0])
    assert numbers == [round(produced[0] / 4), round(produced[1] / 3), round(produced[0] / 2), produced[1]]
    labels = [t for t in batch["labels"][0].tolist() if t >= 0]
    assert collator.decode([labels])[0] == text, "the text that is trained"
    back = collator.regions_in(text, row)[0]["box"]
    for i, (a, b) in enumerate(zip(region["box"], back, strict=True)):
        assert abs(a - b) <= 0.5 * (width, height)[i % 2] / produced[i % 2] + 0.01


def test_a_turned_photo_has_its_boxes_in_the_turned_image(collator, tmp_path):
    """EXIF orientation 6: the file stores 60 x 40 pixels, and all see 40 x 60."""
    from PIL import Image

    row = sample(tmp_path, (60, 40), {"label": "x", "image": 0, "box": [0.0, 30.0, 40.0, 60.0]})
    picture = Image.new("RGB", (60, 40))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    row = replace(row, images=("a.jpg",))
    grid = collator([row])["image_grid_thw"][0].tolist()
    size = [n * collator.processor.image_processor.patch_size for n in (grid[2], grid[1])]
    assert size[1] > size[0]
    assert json.loads(re.search(r"\[[\d, ]+\]", collator.written(row).answer_text)[0]) == [0, size[1] // 2, size[0], size[1]]


def test_box_tokens_are_tokens_in_prompts_and_answers(small, tmp_path):
    """Qwen2-VL's own vocabulary entries, not their spelling; in a prompt, too, where a user's text cannot write them."""
    from mmft.collators.chat import ChatCollator
    from mmft.data.sample import user_turn
    from mmft.models.families.qwen2vl import Qwen2VL
    from mmft.models.load import end_token_ids, load_model

    family = Qwen2VL(path=str(small("qwen2vl")), device="cpu")
    loaded = load_model(family)
    names = ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"]
    loaded.processor.tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    chat = ChatCollator(processor=loaded.processor, family=family, model_config=loaded.model.config, end_token_ids=end_token_ids(family, loaded))
    row = sample(tmp_path, (60, 40), {"label": "cat", "image": 0, "box": [0.0, 0.0, 30.0, 20.0]})
    turn = user_turn(1, "Where is <|box_start|> ")
    turn["content"].append({"type": "ref", "text": "cat"})
    row = replace(row, messages=[turn, row.messages[1]])
    ids = chat([row])["input_ids"][0].tolist()
    counts = [ids.count(i) for i in loaded.processor.tokenizer.convert_tokens_to_ids(names)]
    assert counts == [2, 2, 1, 1], "one name in the prompt and one in the answer; what the user typed is text"
    answer = [t for t in chat([row])["labels"][0].tolist() if t >= 0]
    assert chat.decode([answer]) == ["<|object_ref_start|>cat<|object_ref_end|><|box_start|>(0,0),(500,500)<|box_end|>"]
