"""The caption collator: BLIP-2's rows counted by hand, and against plain transformers' processor."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mmft.collators.base import IGNORE
from mmft.common.errors import RowError, UserError

IMAGE, BOS, NEWLINE = "<image>", "</s>", "Ċ"


def tokens_and_loss(collator, batch, row=0):
    tokens = collator.tokenizer.convert_ids_to_tokens(batch["input_ids"][row])
    return [(t, label != IGNORE) for t, label in zip(tokens, batch["labels"][row].tolist(), strict=True)]


def test_a_bare_caption_counted_by_hand(small):
    collator = small.collator("blip2")
    got = tokens_and_loss(collator, collator([small.sample("a", [0], "", "a red square")]))
    assert got == [(IMAGE, False)] * 6 + [(BOS, False), ("a", True), ("Ġred", True), ("Ġsquare", True), (NEWLINE, True)]


def test_a_prompt_counted_by_hand(small):
    collator = small.collator("blip2")
    got = tokens_and_loss(collator, collator([small.sample("a", [1], "What is in the picture?", "red")]))
    words = ["What", "Ġis", "Ġin", "Ġthe", "Ġpicture", "?"]
    assert got == [(IMAGE, False)] * 6 + [(BOS, False), *((w, False) for w in words), ("Ġred", True), (NEWLINE, True)]


def test_the_end_token_is_the_loaded_models_not_the_tokenizers(small):
    collator = small.collator("blip2")
    newline = collator.tokenizer.encode("\n", add_special_tokens=False)[0]
    assert collator.end_token_id == newline != collator.tokenizer.eos_token_id
    assert collator.end_ids == [newline]


def test_ids_equal_plain_transformers(small):
    """Blip2Processor's own ids, with the end token behind the caption, which the processor does not add."""
    collator = small.collator("blip2")
    row = small.sample("a", [0], "Question: Which colours? Answer:", "red")
    image = row.load_images()[0]
    plain = collator.processor(images=image, text="Question: Which colours? Answer: red", return_tensors="pt")
    batch = collator([row])
    assert batch["input_ids"][0].tolist() == [*plain["input_ids"][0].tolist(), collator.end_token_id]
    assert batch["pixel_values"].equal(plain["pixel_values"])
    prompt = collator.processor(images=image, text="Question: Which colours? Answer:", return_tensors="pt")
    assert collator.prompt([row])["input_ids"][0].tolist() == prompt["input_ids"][0].tolist()


@pytest.mark.parametrize("answer", ["red", " red", "\n12", "3 cats", "é🙂", "<image> </s>", "a\nb"])
@pytest.mark.parametrize("question", ["", "Describe.", "Question: what? Answer:"])
def test_the_generation_prompt_is_a_prefix_of_the_training_row(small, question, answer):
    collator = small.collator("blip2")
    row = small.sample("a", [0], question, answer)
    ids, head = collator([row])["input_ids"][0].tolist(), collator.prompt([row])["input_ids"][0].tolist()
    assert ids[: len(head)] == head
    assert ids.count(collator.image_token_id) == 6
    assert collator.tokenizer.decode(ids[len(head) : -1]).strip() == answer.strip() and ids[-1] == collator.end_token_id


def test_typed_control_tokens_stay_text(small):
    collator = small.collator("blip2")
    row = small.sample("a", [0], "what is <image> and </s> <pad>", "say <image></s> dogs")
    ids = collator([row])["input_ids"][0].tolist()
    assert ids.count(collator.image_token_id) == 6 and ids.count(2) == 1 and ids.count(1) == 0
    assert "what is <image> and </s> <pad> say <image></s> dogs" in collator.tokenizer.decode(ids[6:])


def test_padding_lies_outside_and_carries_no_loss(small):
    collator = small.collator("blip2")
    rows = [small.sample("short", [0], "", "red"), small.sample("long", [1], "", "a red square and a blue circle")]
    batch, prompt = collator(rows), collator.prompt([small.sample("a", [0], "Which colours?", "x"), small.sample("b", [0], "", "x")])
    pad = batch["attention_mask"] == 0
    assert (batch["labels"][pad] == IGNORE).all() and (batch["input_ids"][pad] == 1).all() and pad[0, -1]
    assert (batch["labels"] == collator.end_token_id).sum(dim=1).tolist() == [1, 1]
    assert prompt["attention_mask"][1, 0] == 0 and (prompt["input_ids"][1, -7:-1] == collator.image_token_id).all(), "placeholders after the padding"


def test_a_fixed_prompt_for_every_row(small):
    collator = small.collator("blip2", prompt="a photo of")
    got = tokens_and_loss(collator, collator([small.sample("a", [0], "Describe", "birds")]))
    assert [t for t, _ in got[6:]] == [BOS, "a", "Ġphoto", "Ġof", "Ġbirds", NEWLINE]
    assert collator.tokenizer.decode(collator.prompt([small.sample("a", [0], "Describe", "birds")])["input_ids"][0][7:]) == "a photo of"


def test_what_the_format_cannot_hold_is_refused_by_name(small):
    collator = small.collator("blip2")
    with pytest.raises(RowError, match="^two: 2 images; this model's caption format takes exactly one"):
        collator([small.sample("two", [0, 1], "", "red")])
    with pytest.raises(RowError, match="^none: 0 images"):
        collator([small.sample("none", [], "hello", "red")])
    with pytest.raises(RowError, match="^turns: 4 messages"):
        collator([small.sample("turns", [0], "a", "b", "c", "d")])


def test_too_few_placeholders_are_refused_even_when_rows_cancel(small):
    """Blip2 itself has no such check: it would run, and one row's features would lie in the other's places."""
    collator = small.collator("blip2")
    encode = collator.encode

    def moved(samples, images, generation):
        rows, tensors = encode(samples, images, generation)
        token = collator.image_token_id
        [first], [second] = rows
        return [[replace(first, ids=[*first.ids[2:], 5, 5])], [replace(second, ids=[token, token, *second.ids[2:]])]], tensors

    collator.encode = moved
    try:
        with pytest.raises(RowError, match="^first: 4 image tokens in the text but 6 image features"):
            collator([small.sample("first", [0], "", "red"), small.sample("second", [1], "", "red")])
    finally:
        del collator.encode


def test_a_chat_models_processor_is_refused(small):
    from mmft.collators.caption import CaptionCollator

    chat = small.collator("qwen2vl")
    with pytest.raises(UserError, match="collator=caption: BLIP-2's format, and Qwen2VLProcessor has no query tokens; use collator=chat"):
        CaptionCollator(processor=chat.processor, family=chat.family, model_config=chat.model_config, end_token_ids=[1])
