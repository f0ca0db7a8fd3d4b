"""The chat collator: what carries loss, what stays text, what is refused; ids against plain transformers."""

from __future__ import annotations

import random

import pytest
from small_models import KINDS

from mmft.collators.base import IGNORE
from mmft.common.errors import RowError, UserError
from mmft.data.sample import assistant_turn, user_turn

CHAT = [k for k in KINDS if k != "blip2"]
END = {"qwen2vl": "<|im_end|>", "qwen2_5vl": "<|im_end|>", "qwen3vl": "<|im_end|>", "llava": "<|im_end|>", "llava_vicuna": "</s>", "smolvlm": "<end_of_utterance>",
       "gemma3": "<end_of_turn>", "internvl": "<|im_end|>", "llava_onevision": "<|im_end|>"}  # fmt: skip
# Image tokens of pictures 0 (56x56), 1 (84x56), 2 (112x84), by hand: Qwen's are (w/28) x (h/28), of sizes rounded to 28
# (Qwen3-VL: to 32, 56 -> 2 x 32, 84 -> 3 x 32, 112 -> 4 x 32);
# LLaVA's (56/14)^2 whatever the picture; SmolVLM's 4 for each of 1 + 2x2 (2x1, 2x2) tiles; Gemma's always 4.
# InternVL's at most two tiles of 4: one for the square; wide pictures get two and the whole beside them.
# LLaVA-OneVision's 16 for the whole, and the tiles' 14-pixel patches without their padding, a newline behind each row:
# 4 x (4 + 1), 4 x (6 + 1), 6 x (8 + 1).
FEATURES = {"qwen2vl": [4, 6, 12], "qwen2_5vl": [4, 6, 12], "qwen3vl": [4, 6, 12], "llava": [16, 16, 16], "llava_vicuna": [16, 16, 16], "smolvlm": [20, 20, 20],
            "gemma3": [4, 4, 4], "internvl": [4, 12, 4], "llava_onevision": [36, 44, 70]}  # fmt: skip
TYPED = "<image> <|im_end|> <|image_pad|> </s> <end_of_turn> <start_of_image> <IMG_CONTEXT> <end_of_utterance> <s> <bos>"


def supervised(collator, batch, row=0):
    ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels, strict=True)), "a label is its own token or nothing"
    return collator.tokenizer.decode([i for i in labels if i != IGNORE])


@pytest.mark.parametrize("kind", CHAT)
def test_loss_lies_on_the_answer_and_its_end_token_alone(small, kind):
    collator = small.collator(kind)
    batch = collator([small.sample("a", [0], "What is in the picture?", "a red square")])
    assert supervised(collator, batch).strip() == "a red square" + END[kind]
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    # the vocabulary knows `a`, ` red` and ` square` as one token each: three, and the end token
    assert sum(label != IGNORE for label in labels) == 4
    end = collator.tokenizer.convert_tokens_to_ids(END[kind])
    assert labels.count(end) == 1 and collator.end_token_id == end
    assert ids.count(collator.image_token_id) == FEATURES[kind][0] and collator.image_token_id not in labels
    carried = [i for i, label in enumerate(labels) if label != IGNORE]
    assert carried == list(range(carried[0], carried[0] + 4)), "without a gap"


def test_a_whole_row_counted_by_hand(small):
    collator = small.collator("qwen2vl")
    batch = collator([small.sample("a", [0], "What is in the picture?", "a red square")])
    tokens = collator.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    system = ["<|im_start|>", "system", "Ċ", "You", "Ġare", "Ġa", "Ġhelpful", "Ġassistant", ".", "<|im_end|>", "Ċ"]
    user = ["<|im_start|>", "user", "Ċ", "<|vision_start|>", *["<|image_pad|>"] * 4, "<|vision_end|>",
            "What", "Ġis", "Ġin", "Ġthe", "Ġpicture", "?", "<|im_end|>", "Ċ"]  # fmt: skip
    assistant = ["<|im_start|>", "assistant", "Ċ", "a", "Ġred", "Ġsquare", "<|im_end|>", "Ċ"]
    assert tokens == system + user + assistant
    mask = (batch["labels"][0] != IGNORE).tolist()
    assert mask == [False] * (11 + 17 + 3) + [True] * 4 + [False]


def test_a_template_without_end_tokens_is_given_them(small):
    collator = small.collator("llava_vicuna")
    batch = collator([small.sample("a", [0], "What is it?", "a red square", "Which colours?", "blue")])
    tokens = collator.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens[0] == "<s>" and tokens.count("<s>") == 1
    labels = batch["labels"][0]
    assert supervised(collator, batch) == "a red square</s> blue</s>"
    assert tokens.count("</s>") == 2 == (labels == 2).sum()


@pytest.mark.parametrize("kind", CHAT)
def test_ids_equal_plain_transformers(small, kind):
    """The full conversation and the generation prompt, as processor.apply_chat_template(tokenize=True) gives them."""
    collator = small.collator(kind)
    for row in (
        small.sample("one", [0], "What is in the picture?", "a red square"),
        small.sample("two", [1, 2], "Compare both 12 times", "first, second 3"),
        small.sample("system", [2], "Describe.", "hello", system="You see"),
        small.sample("turns", [0], "What?", "first", "And?", "second"),
    ):
        images = iter(row.load_images())
        plain = [
            {**m, "content": [{"type": "image", "image": next(images)} if p["type"] == "image" else p for p in m["content"]]}
            for m in row.messages
        ]
        options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        whole = collator.processor.apply_chat_template(plain, **options)
        prompt = collator.processor.apply_chat_template(plain[:-1], add_generation_prompt=True, **options)
        training, generation = collator([row]), collator.prompt([row])
        end = collator.tokenizer.convert_tokens_to_ids("</s>") if kind == "llava_vicuna" else None  # added by us alone
        assert [i for i in training["input_ids"][0].tolist() if i != end] == whole["input_ids"][0].tolist()
        assert [i for i in generation["input_ids"][0].tolist() if i != end] == prompt["input_ids"][0].tolist()
        for key in set(whole) - {"input_ids", "attention_mask"}:
            if end is None or not key.endswith("type_ids"):
                assert training[key].equal(whole[key]), key
        assert set(training) - {"labels", "row_ids"} == set(whole)


@pytest.mark.parametrize("kind", CHAT)
def test_the_generation_prompt_is_a_prefix_of_the_training_row(small, kind):
    """Also where the answer begins with white space, a newline, a digit or half of a merge."""
    collator = small.collator(kind)
    rng = random.Random(0)
    pieces = [" ", "\n", "\n\n", "  ", "1", "23", "é", "🙂", "red", " square", ".", "<image>", "</s>", "<|im_end|>", "\t", "What", "'s"]
    for n in range(25):
        question = "".join(rng.choices(pieces, k=rng.randint(1, 5))) + rng.choice(["", " ", "  ", "\n", ":"])
        answer = "".join(rng.choices(pieces, k=rng.randint(0, 4))) + "dogs" + rng.choice(["", " ", "\n", "é", "🙂", "</s>"])
        row = small.sample(f"{n}", [n % 3], question, answer)
        batch, prompt = collator([row]), collator.prompt([row])
        ids, head = batch["input_ids"][0].tolist(), prompt["input_ids"][0].tolist()
        labels = batch["labels"][0].tolist()
        assert ids[: len(head)] == head, (question, answer)
        assert all(label == IGNORE for label in labels[: len(head)]) and labels[len(head)] != IGNORE, (question, answer)
        text = supervised(collator, batch)
        assert text.removesuffix(END[kind]).strip() == answer.strip()
        last = max(i for i, label in enumerate(labels) if label != IGNORE)
        assert IGNORE not in labels[len(head) : last + 1], "loss without a gap, from the prompt's end to the end token"
        assert ids.count(collator.image_token_id) == FEATURES[kind][n % 3]


@pytest.mark.parametrize("kind", CHAT)
def test_every_assistant_turn_carries_loss(small, kind):
    collator = small.collator(kind)
    batch = collator([small.sample("a", [0], "What is it?", "a red square", "And?", "blue", "More?", "birds")])
    text = supervised(collator, batch)
    assert [t.strip() for t in text.split(END[kind])] == ["a red square", "blue", "birds", ""]
    # the prompt of the last turn holds the earlier answers, ended as they are in training
    head = collator.prompt([small.sample("a", [0], "What is it?", "a red square", "And?", "blue", "More?", "birds")])["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist()[: len(head)] == head and head.count(collator.end_token_id) >= 2


@pytest.mark.parametrize("kind", CHAT)
def test_rows_with_two_one_and_no_images_in_one_batch(small, kind):
    collator = small.collator(kind)
    rows = [
        small.sample("two", [1, 0], "Compare", "first, second"),
        small.sample("none", [], "What is a dog?", "a few words"),
        small.sample("later", [2], user_turn(0, "Hello."), assistant_turn("red"), user_turn(1, "And this?"), assistant_turn("a blue circle")),
    ]
    batch = collator(rows)
    count = (batch["input_ids"] == collator.image_token_id).sum(dim=1).tolist()
    f = FEATURES[kind]
    # LLaVA-OneVision cuts a picture into tiles only where it is the row's only one; of several each is 16 and a newline
    assert count == [17 + 17 if kind == "llava_onevision" else f[1] + f[0], 0, f[2]]
    pad = batch["attention_mask"] == 0
    assert pad.any() and (batch["labels"][pad] == IGNORE).all() and (batch["input_ids"][pad] == collator.tokenizer.pad_token_id).all()
    assert not pad[:, 0].any(), "training rows are padded on the right"
    for i, row in enumerate(rows):  # each row of the batch is the row alone
        alone = collator([row])
        n = alone["input_ids"].shape[1]
        assert batch["input_ids"][i, :n].equal(alone["input_ids"][0]) and batch["labels"][i, :n].equal(alone["labels"][0])
    assert supervised(collator, batch, 1).strip() == "a few words" + END[kind]


@pytest.mark.parametrize("kind", CHAT)
def test_prompts_are_padded_on_the_left_and_carry_no_labels(small, kind):
    collator = small.collator(kind)
    rows = [small.sample("short", [0], "What?", "red"), small.sample("long", [0], "What is in the picture? Which colours do you see?", "red")]
    batch = collator.prompt(rows)
    assert "labels" not in batch and "row_ids" not in batch
    assert batch["attention_mask"][0, 0] == 0 and batch["attention_mask"][:, -1].all()
    for i, row in enumerate(rows):
        alone = collator.prompt([row])["input_ids"][0]
        assert batch["input_ids"][i, -len(alone) :].equal(alone)


@pytest.mark.parametrize("kind", CHAT)
def test_control_tokens_that_a_user_typed_stay_text(small, kind):
    collator = small.collator(kind)
    plain = collator([small.sample("plain", [0], "what is a here", "say")])
    typed = collator([small.sample("typed", [0], f"what is {TYPED} here", f"say {TYPED} dogs")])
    special = {i for i in collator.tokenizer.added_tokens_decoder if collator.tokenizer.added_tokens_decoder[i].special}

    def controls(batch):
        return [i for i in batch["input_ids"][0].tolist() if i in special]

    assert controls(typed) == controls(plain), "not one control token more"
    text = collator.tokenizer.decode(typed["input_ids"][0])
    assert f"what is {TYPED} here" in text
    assert supervised(collator, typed).strip() == f"say {TYPED} dogs{END[kind]}"
    assert collator.decode([collator.tokenizer.encode(f"say {TYPED}", add_special_tokens=False, split_special_tokens=True)]) == [f"say {TYPED}"]


@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "smolvlm", "gemma3"])
def test_typed_control_tokens_get_the_ids_that_transformers_sanitizing_gives(small, kind):
    """Left out, for transformers 5.23 refuses them: InternVL (counts typed `<IMG_CONTEXT>` as images) and Llama without BOS in the template."""
    import inspect

    from transformers import ProcessorMixin

    if "sanitize_control_tokens" not in inspect.signature(ProcessorMixin.apply_chat_template).parameters:
        pytest.skip("this transformers' processors do not sanitize, so there is nothing to compare with")
    collator = small.collator(kind)
    row = small.sample("typed", [0], f"what is {TYPED}", "dogs")
    content = [{"type": "image", "image": row.load_images()[0]}, row.messages[0]["content"][1]]
    theirs = collator.processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, sanitize_control_tokens=True
    )
    assert collator.prompt([row])["input_ids"][0].tolist() == list(theirs["input_ids"][0])


def test_markers_typed_by_a_user_open_no_door(small):
    from mmft.collators.control_tokens import CLOSE, OPEN

    collator = small.collator("qwen2vl")
    start, end = OPEN, CLOSE
    batch = collator([small.sample("a", [0], f"x{end}<|im_end|>{start}<|im_start|>{end}", "dogs")])
    tokens = collator.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert tokens.count("<|im_end|>") == 3 and tokens.count("<|im_start|>") == 3


def test_an_image_token_cannot_be_glued_from_its_halves_around_a_typed_one(small):
    collator = small.collator("llava")
    batch = collator([small.sample("a", [0], "<im<image>age>", "dogs")])
    assert (batch["input_ids"] == collator.image_token_id).sum() == 16


def test_system_prompt_of_the_config(small):
    with_system = small.collator("qwen2vl", system="You see colours")
    row, own = small.sample("a", [0], "What?", "red"), small.sample("b", [0], "What?", "red", system="Be brief")
    assert "system\nYou see colours<|im_end|>" in with_system.tokenizer.decode(with_system([row])["input_ids"][0])
    assert "system\nYou see colours<|im_end|>" in with_system.tokenizer.decode(with_system.prompt([row])["input_ids"][0])
    assert "system\nBe brief<|im_end|>" in with_system.tokenizer.decode(with_system([own])["input_ids"][0])
    gemma = small.collator("gemma3", system="You see colours")
    assert "user\nYou see colours\n\n" in gemma.tokenizer.decode(gemma([row])["input_ids"][0])


def test_rows_whose_errors_cancel_are_refused_by_name(small):
    collator = small.collator("qwen2vl")
    rows = [small.sample("first", [0], "a", "b"), small.sample("second", [2], "a", "b")]
    encode = collator.encode

    def swapped(samples, images, generation):  # 4 and 12 features, 12 and 4 placeholders: the total is right
        encoded, tensors = encode(samples, images, generation)
        tensors["image_grid_thw"] = tensors["image_grid_thw"].flip(0)
        return encoded, tensors

    collator.encode = swapped
    try:
        with pytest.raises(RowError, match="^first: 4 image tokens in the text but 12 image features"):
            collator(rows)
    finally:
        del collator.encode


def test_a_row_with_fewer_image_places_than_images_is_refused(small):
    from dataclasses import replace

    for kind in CHAT:
        collator = small.collator(kind)
        good = small.sample("good", [0], "What?", "red")
        fewer = replace(small.sample("bad", [0], "What?", "red"), images=("0.png", "1.png"))
        more = replace(small.sample("bad", [0, 1], "What?", "red"), images=("0.png",))
        for rows in ([fewer], [good, fewer], [more], [good, more], [fewer, more]):
            with pytest.raises(RowError, match="^bad: [12] images but [12] image places"):
                collator(rows)


def with_template(collator, template, **keys):
    """A collator like the given one, whose processor has another chat template."""
    processor, old = collator.processor, collator.processor.chat_template
    processor.chat_template = template
    try:
        return type(collator)(
            processor=processor, family=collator.family, model_config=collator.model_config, end_token_ids=collator.end_token_ids, **keys
        )
    finally:
        processor.chat_template = old


def test_a_template_that_drops_an_image_is_refused_by_row_name(small):
    one = (
        "{%- for m in messages -%}{{- '<|im_start|>' -}}{%- for p in m.content -%}{%- if p.type == 'image' and loop.first -%}{{- '<image>' -}}{%- endif -%}"
        "{%- if p.type == 'text' -%}{{- p.text -}}{%- endif -%}{%- endfor -%}{{- '<|im_end|>' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>' -}}{%- endif -%}"
    )
    collator = with_template(small.collator("llava"), one)
    assert (collator([small.sample("one", [0], "Look", "red")])["input_ids"] == collator.image_token_id).sum() == 16
    with pytest.raises(RowError, match="^two: .*1.* and 2 images"):
        collator([small.sample("two", [0, 1], "Compare", "red")])


def test_max_length_refuses_and_never_cuts(small):
    row = small.sample("long", [2], "What is in the picture?", "a red square")
    n = small.collator("qwen2vl")([row])["input_ids"].shape[1]
    assert small.collator("qwen2vl", max_length=n)([row])["input_ids"].shape[1] == n
    with pytest.raises(RowError, match=rf"^long: {n} tokens, more than collator.max_length={n - 1}"):
        small.collator("qwen2vl", max_length=n - 1)([row])


def test_a_template_that_refuses_the_conversation_names_the_row(small):
    collator = small.collator("gemma3")
    twice = small.sample("odd", [0], user_turn(1, "What?"), user_turn(0, "And?"), assistant_turn("red"))
    with pytest.raises(RowError, match="^odd: the chat template refuses this conversation: .*must alternate"):
        collator([twice])


def test_an_empty_answer_in_the_middle_names_the_row(small):
    with pytest.raises(RowError, match="^hollow: an answer is empty"):
        small.collator("qwen2vl")([small.sample("hollow", [0], "What?", " ", "And?", "red")])


def test_a_next_turns_opening_token_is_not_taken_for_the_end(small):
    """A template that ends no answer but opens every turn with a control token."""
    collator = small.collator("qwen2vl")
    template = (
        "{%- for m in messages -%}{{- '<|im_start|>' + m.role + ':' -}}{%- for p in m.content -%}{%- if p.type == 'image' -%}"
        "{{- '<|image_pad|>' -}}{%- else -%}{{- p.text -}}{%- endif -%}{%- endfor -%}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant:' -}}{%- endif -%}"
    )
    other = with_template(collator, template)
    batch = other([small.sample("a", [0], "What?", "red", "And?", "blue")])
    assert supervised(other, batch) == "red<|im_end|>blue<|im_end|>"


def test_a_processor_without_a_template_is_a_users_error(small):
    collator = small.collator("qwen2vl")
    processor, old, olds = collator.processor, collator.processor.chat_template, collator.tokenizer.chat_template
    processor.chat_template = processor.tokenizer.chat_template = None
    try:
        with pytest.raises(UserError, match="no chat template; use collator=completion"):
            type(collator)(processor=processor, family=collator.family, model_config=collator.model_config, end_token_ids=[1])
    finally:
        processor.chat_template, processor.tokenizer.chat_template = old, olds


def test_decode_strips_special_tokens_and_white_space(small):
    collator = small.collator("qwen2vl")
    ids = collator.tokenizer.encode(" a red square \n<|im_end|><|endoftext|><|endoftext|>", add_special_tokens=False)
    assert collator.decode([ids]) == ["a red square"]
