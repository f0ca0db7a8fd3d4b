"""Size keys of a row's images (min_pixels, max_pixels, resized_height, resized_width) against qwen-vl-utils itself."""

from __future__ import annotations

import logging

import pytest

from mmft.common.errors import RowError
from mmft.data.sample import Sample, assistant_turn, text_part

FACTOR = {"qwen2vl": (14, 28), "qwen2_5vl": (14, 28), "qwen3vl": (16, 32)}  # patch, pixels of a token's side


def row(small, *sizes, id="row", images=None):
    images = images or range(len(sizes))
    parts = [{"type": "image", **keys} for keys in sizes]
    messages = [{"role": "user", "content": [*parts, text_part("What?")]}, assistant_turn("red")]
    return Sample(id, tuple(f"{i}.png" for i in images), messages, ("red",), str(small.root))


# Rows of one image each (of 56 x 56, 84 x 56 or 112 x 84 pixels) with both bounds or both sides, so that nothing is left to a default.
CASES = [
    (0, {"min_pixels": 784, "max_pixels": 1600}), (0, {"min_pixels": 100_000, "max_pixels": 200_000}), (1, {"min_pixels": 50_176, "max_pixels": 100_352}),
    (1, {"min_pixels": 784, "max_pixels": 3136}), (2, {"min_pixels": 4 * 784, "max_pixels": 5 * 784}), (2, {"min_pixels": 3136, "max_pixels": 12_845_056}),
    (0, {"resized_height": 280, "resized_width": 420}), (1, {"resized_height": 50, "resized_width": 90}), (2, {"resized_height": 84, "resized_width": 30}),
    (2, {"resized_height": 14, "resized_width": 14}), (0, {"resized_height": 60, "resized_width": 60, "max_pixels": 784}), (1, {"resized_height": 112, "resized_width": 112, "min_pixels": 784}),
]  # fmt: skip


@pytest.mark.parametrize("kind", FACTOR)
@pytest.mark.parametrize(("image", "keys"), CASES)
def test_tokens_and_pixels_are_those_of_qwen_vl_utils(small, kind, image, keys):
    """Golden: process_vision_info's image through the processor without further resizing, as Qwen's model cards do it."""
    from qwen_vl_utils.vision_process import fetch_image

    own, (patch, side) = small.collator(kind), FACTOR[kind]
    sample = row(small, keys, images=[image])
    picture = fetch_image({"image": sample.load_images()[0], **keys}, image_patch_size=patch)
    plain = own.processor.image_processor([picture], do_resize=False, return_tensors="pt")
    for batch in (own([sample]), own.prompt([sample])):
        assert batch["pixel_values"].equal(plain["pixel_values"]) and batch["image_grid_thw"].equal(plain["image_grid_thw"])
        assert (batch["input_ids"] == own.image_token_id).sum() == (picture.width // side) * (picture.height // side)
    assert own.measure(sample).tokens == own([sample])["input_ids"].shape[1]


def test_a_bound_that_a_row_leaves_out_is_the_processors(small):
    """The small model's images have 784 to 12544 pixels; counted by hand."""
    own = small.collator("qwen2vl")

    def tokens(image, **keys):
        return int((own([row(small, keys, images=[image])])["input_ids"] == own.image_token_id).sum())

    assert tokens(2) == 4 * 3
    assert tokens(2, min_pixels=1) == 4 * 3 and tokens(2, max_pixels=12_544) == 4 * 3
    assert tokens(0, min_pixels=9000) == 4 * 4  # 56 x 56 = 3136, enlarged to 112 x 112 = 12544
    assert tokens(0, min_pixels=50_000) == 8 * 8  # above the processor's most: the row's bound holds, 224 x 224 = 50176
    assert tokens(2, max_pixels=2 * 784) == 1  # 112 x 84 shrunk to 45 x 34: 28 x 28


def test_rows_with_and_without_sizes_in_one_batch(small):
    """In the order of the batch, each row as it is alone."""
    import torch

    own = small.collator("qwen2vl")
    rows = [row(small, {}, id="a", images=[2]), row(small, {"resized_height": 56, "resized_width": 140}, id="b", images=[0]), row(small, {}, id="c", images=[1]),
            row(small, {"max_pixels": 1600}, {}, id="d", images=[0, 1]), row(small, id="e")]  # fmt: skip
    for make in (own, own.prompt):
        batch, alone = make(rows), [make([r]) for r in rows]
        grids = [a["image_grid_thw"] for a in alone if "image_grid_thw" in a]
        assert batch["image_grid_thw"].equal(torch.cat(grids)) and batch["pixel_values"].equal(torch.cat([a["pixel_values"] for a in alone if "pixel_values" in a]))
        assert (batch["input_ids"] == own.image_token_id).sum(dim=1).tolist() == [12, 2 * 5, 6, 1 + 6, 0]


def test_a_row_without_sizes_is_untouched_by_its_neighbour(small):
    own = small.collator("qwen2vl")
    plain, sized = row(small, {}, images=[2]), row(small, {"max_pixels": 1600}, images=[0])
    assert own([sized, plain])["pixel_values"][-48:].equal(own([plain])["pixel_values"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resized_height": 280}, "^row: resized_height=280: resized_height and resized_width belong together"),
        ({"min_pixels": 5000, "max_pixels": 1000}, "^row: min_pixels=5000, max_pixels=1000: min_pixels is above max_pixels"),
        ({"max_pixels": "many"}, "^row: max_pixels=many: a size is a whole number of pixels above 0"),
        ({"max_pixels": -1}, "^row: max_pixels=-1: a size is a whole number"),
        ({"min_pixels": True}, "^row: min_pixels=True: a size is a whole number"),
        ({"max_pixels": 1.5}, "^row: max_pixels=1.5: a size is a whole number"),
        ({"resized_height": 10, "resized_width": 9000}, "^row: resized_height=10, resized_width=9000: absolute aspect ratio must be smaller than 200"),
    ],
)
def test_wrong_sizes_name_the_row(small, keys, message):
    with pytest.raises(RowError, match=message):
        small.collator("qwen2vl")([row(small, keys, images=[0])])
    with pytest.raises(RowError, match=message):
        small.collator("qwen2vl").measure(row(small, keys, images=[0]))


@pytest.mark.parametrize("kind", ["llava", "gemma3", "smolvlm", "internvl", "llava_onevision", "blip2"])
def test_families_without_such_sizes_say_so_once(small, kind, caplog):
    from small_models import collator

    own = collator(kind, small(kind))
    sized, plain = row(small, {"max_pixels": 784}, images=[2]), row(small, {}, images=[2])
    with caplog.at_level(logging.INFO, logger="mmft"):
        batches = [own([sized]) for _ in range(3)]
    assert all(batches[0][k].equal(v) for k, v in own([plain]).items() if k != "row_ids")
    assert [r.getMessage() for r in caplog.records] == ["image sizes    max_pixels of rows (the first: row) have no effect: this model has no such sizes; see model.processor"]


def test_the_feature_cache_tells_sizes_of_one_image_apart(small):
    from dataclasses import replace

    own = small.collator("qwen2vl")
    shas = ("ab" * 32,)
    keys = [own.image_keys(replace(row(small, size, images=[0]), sha256=shas)) for size in ({}, {"max_pixels": 784}, {"max_pixels": 1600}, {"max_pixels": 784})]
    assert keys[0] == [shas[0]] and keys[1] == keys[3] and len({k for [k] in keys}) == 3
