"""scan: lengths and faults of all rows before training, without decoding an image, and equal to what a batch holds."""

from __future__ import annotations

import pytest
from chat_models import TEMPLATES, collator
from small_models import KINDS

from mmft.collators.base import IGNORE
from mmft.collators.scan import scan
from mmft.common.errors import RowError
from mmft.data.sample import Sample, assistant_turn, text_part, user_turn


def rows_of_all_shapes(small):
    texts = [("What is in the picture?", "a red square"), ("", "<image> </s> dogs"), ("Describe <|im_end|>.", "\n\nhello 12"), ("x", "é🙂")]
    rows = [small.sample(f"{i}-{n}", [n], *turns) for i, turns in enumerate(texts) for n in range(3)]
    return [*rows, small.sample("two", [1, 2], "Compare both 12 times", "first", "And?", "\n blue", system="You see"), small.sample("none", [], "Hello <image>", "x"),
            small.sample("between", [0, 2], {"role": "user", "content": [{"type": "image"}, text_part("and"), {"type": "image"}]}, "red", "Why?", "it is")]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_lengths_are_those_of_the_batches(small, kind, monkeypatch):
    own, rows = small.collator(kind), rows_of_all_shapes(small)
    expected = []
    for row in rows:
        try:
            batch = own([row])
            expected.append((batch["input_ids"].shape[1], int((batch["labels"][0, 1:] != IGNORE).sum())))
        except RowError:
            expected.append((0, 0))
    monkeypatch.setattr(Sample, "load_images", lambda self: pytest.fail("an image was decoded"))
    found = scan(own, rows)
    assert list(zip(found.tokens, found.loss_tokens)) == expected
    assert len(found.refused) == expected.count((0, 0)) and not found.too_long and not found.without_loss
    assert (found.message() == "") == (not found.refused)


def test_all_faults_are_collected_in_one_line(small, tmp_path):
    from PIL import Image

    Image.new("RGB", (112, 112)).save(tmp_path / "large.png")
    own = small.collator("qwen2vl", max_length=45)
    good, hollow = small.sample("good", [0], "What?", "red"), small.sample("hollow", [0], "What?", " ")
    large = Sample("large", ("large.png",), [user_turn(1, "What?"), assistant_turn("red and blue and 12 dogs")], ("x",), str(tmp_path))
    missing = Sample("gone", ("gone.png",), [user_turn(1, "What?"), assistant_turn("red")], ("x",), str(tmp_path))
    silent = small.sample("silent", [0], "What?", {"role": "assistant", "content": [text_part("red")], "loss": False})
    places = Sample("places", ("0.png",), [user_turn(2, "What?"), assistant_turn("red")], ("x",), str(small.root))
    rows = [good, large, hollow, missing, silent, good, large, places]
    found = scan(own, rows)
    n = own.measure(large).tokens
    assert n > 45 and [(p.index, p.row, p.tokens) for p in found.too_long] == [(1, "large", n), (6, "large", n)]
    assert [p.index for p in found.unusable] == [1, 2, 3, 4, 6, 7]
    message = found.message()
    assert f"2 of 8 rows are longer than collator.max_length=45: large ({n} tokens), large ({n} tokens)" in message
    assert "hollow (an answer is empty" in message and "gone (missing image: no such file" in message and "silent (every answer has loss: false" in message
    assert "places (1 images but 2 image places" in message and "good" not in message and "\n" not in message
    for row in rows:
        if row is not good:
            with pytest.raises(Exception, match="large: .* tokens|hollow|gone|silent|places"):
                own([row])


def test_a_caption_without_loss(small):
    row = small.sample("a", [0], "", {"role": "assistant", "content": [text_part("red")], "loss": False})
    found = scan(small.collator("blip2"), [row])
    assert [p.row for p in found.without_loss] == ["a"] and found.message().startswith("1 rows have no token with loss: a")


def test_rotated_photographs_are_measured_upright(small, tmp_path):
    """EXIF orientation 6 turns 168 x 28 into 28 x 168; with a limit on the rows' side the two differ."""
    from PIL import Image

    picture = Image.new("RGB", (200, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "a.jpg", exif=exif)
    for kind in ("qwen2vl", "llava_onevision", "internvl"):
        own = small.collator(kind)
        row = Sample("a", ("a.jpg",), [user_turn(1, "What?"), assistant_turn("red")], ("red",), str(tmp_path))
        assert own.measure(row).tokens == own([row])["input_ids"].shape[1]


def test_images_of_any_size(small, tmp_path):
    """The number of tokens follows from the header, at every size and shape that the processor handles."""
    import random

    from PIL import Image

    rng = random.Random(1)
    for kind in ("qwen2vl", "qwen3vl", "smolvlm", "internvl", "llava_onevision", "gemma3"):
        own = small.collator(kind)
        for n in range(12):
            size = rng.randint(10, 400), rng.randint(10, 400)
            Image.new("RGB", size).save(tmp_path / "a.png")
            row = Sample("a", ("a.png",), [user_turn(1, "What?"), assistant_turn("red")], ("red",), str(tmp_path))
            try:
                tokens = own([row])["input_ids"].shape[1]
            except RowError:
                continue
            assert own.measure(row).tokens == tokens, (kind, size, n)


def test_rows_of_several_sequences_are_counted_by_their_longest(small):
    own = collator(small, TEMPLATES["open"], tokens=("<think>", "</think>"))
    turns = [m for word in ("red", "blue") for m in (user_turn(int(word == "red"), "What?"), {"role": "assistant", "content": [text_part(word)], "reasoning_content": "it is"})]
    row = Sample("a", ("0.png",), turns, ("blue",), str(small.root))
    found, batch = scan(own, [row]), own([row])
    assert found.several == 1 and found.tokens == [batch["input_ids"].shape[1]] and found.loss_tokens == [int((batch["labels"] != IGNORE).sum())]


def test_rows_with_sizes_of_a_family_without_them_are_counted(small):
    row = small.sample("a", [0], {"role": "user", "content": [{"type": "image", "max_pixels": 784}]}, "red")
    assert scan(small.collator("llava"), [row, small.sample("b", [0], "What?", "red"), row]).ignored_sizes == 2
    assert scan(small.collator("qwen2vl"), [row]).ignored_sizes == 0
