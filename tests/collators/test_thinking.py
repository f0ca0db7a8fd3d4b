"""Templates of thinking models: every answer is trained behind the prompt that precedes it in use; texts written by hand."""

from __future__ import annotations

import logging

import pytest
from chat_models import TEMPLATES, collator, taught
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from mmft.collators.base import IGNORE
from mmft.common.errors import RowError
from mmft.data.sample import Sample, text_part, user_turn

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
THINK = ("<think>", "</think>")


@pytest.fixture(scope="module")
def made(small):
    collators = {}

    def get(name):
        if name not in collators:
            collators[name] = collator(small, TEMPLATES[name], tokens=THINK)
        return collators[name]

    return get


def row(small, *turns, images=(0,), id="row"):
    """Turns alternate between user and assistant; an answer may be (reasoning, answer), given as reasoning_content."""
    messages = []
    for i, turn in enumerate(turns):
        if i % 2 == 0:
            messages.append(user_turn(len(images) if i == 0 else 0, turn))
        elif isinstance(turn, tuple):
            messages.append({"role": "assistant", "content": [text_part(turn[1])], "reasoning_content": turn[0]})
        else:
            messages.append({"role": "assistant", "content": [text_part(turn)]})
    answer = turns[-1][1] if isinstance(turns[-1], tuple) else turns[-1]
    return Sample(id, tuple(f"{i}.png" for i in images), messages, (answer,), str(small.root))


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|>\n"


HEADER = "<|im_start|>assistant\n"
FIRST = user(PICTURE + "What?") + HEADER
# What the model has to write for the answer `red` after the reasoning `it looks red`, and for `red` alone, and the prompt's end.
SINGLE = {
    "open": ("<think>\n", "it looks red\n</think>\n\nred<|im_end|>", "\n</think>\n\nred<|im_end|>"),
    "hybrid": ("", "<think>\nit looks red\n</think>\n\nred<|im_end|>", "<think>\n\n</think>\n\nred<|im_end|>"),
    "stripped": ("<think>\n", "it looks red\n</think>\n\nred<|im_end|>", "\n</think>\n\nred<|im_end|>"),
    "apart": ("<think>\n", "it looks red\n</think>\n\nred<|im_end|>", "\n</think>\n\nred<|im_end|>"),
    "empty": ("", "<think>it looks red</think>\nred<|im_end|>", "<think></think>\nred<|im_end|>"),
    "kept": ("<think>\n", "it looks red\n</think>\n\nred<|im_end|>", "\n</think>\n\nred<|im_end|>"),
    "unaware": ("", "<think>\nit looks red\n</think>\n\nred<|im_end|>", "red<|im_end|>"),
    "kimi": ("◁think▷", "it looks red◁/think▷red<|im_end|>", "◁/think▷red<|im_end|>"),
}  # fmt: skip


@pytest.mark.parametrize("name", SINGLE)
def test_one_answer_with_reasoning_content(small, made, name):
    opened, written, _ = SINGLE[name]
    sample = row(small, "What?", ("it looks red", "red"))
    assert taught(made(name), made(name)([sample])) == [(FIRST + opened, written)]


@pytest.mark.parametrize("name", SINGLE)
def test_one_answer_without_reasoning(small, made, name):
    opened, _, written = SINGLE[name]
    assert taught(made(name), made(name)([row(small, "What?", "red")])) == [(FIRST + opened, written)]


@pytest.mark.parametrize("name", ["open", "hybrid", "stripped", "apart", "empty", "kept", "unaware"])
@pytest.mark.parametrize("text", ["<think>\nit looks red\n</think>\n\nred", "<think>it looks red</think>\nred", "<think>\nit looks red</think>red"])
def test_reasoning_inside_the_answer_is_the_same_answer(small, made, name, text):
    opened, written, _ = SINGLE[name]
    [(before, learned)] = taught(made(name), made(name)([row(small, "What?", text)]))
    assert before == FIRST + opened
    if name in ("stripped", "unaware"):  # these do not set reasoning out anew: it stays as the row has it
        written = text.removeprefix("<think>").removeprefix("\n") if name == "stripped" else text
        assert learned == written + "<|im_end|>"
    else:
        assert learned == written


def test_kimi_block_inside_the_answer(small, made):
    got = taught(made("kimi"), made("kimi")([row(small, "What?", "◁think▷it looks red◁/think▷red")]))
    assert got == [(FIRST + "◁think▷", "it looks red◁/think▷red<|im_end|>")]


def test_a_prompt_with_a_closed_block(small, made):
    for name in ("closed", "hidden"):
        got = taught(made(name), made(name)([row(small, "What?", "red")]))
        assert got == [(FIRST + "<think>\n\n</think>\n\n", "red<|im_end|>")], name


def test_a_template_that_leaves_reasoning_out_refuses_the_row(small, made):
    for name in ("closed", "hidden"):
        with pytest.raises(RowError, match="^row: the chat template leaves out this answer's reasoning"):
            made(name)([row(small, "What?", ("it looks red", "red"))])


TURNS = ("What?", ("it looks red", "red"), "And?", ("then blue", "blue"), "More?", ("many wings", "birds"))


def test_earlier_turns_without_their_reasoning_give_one_sequence_each(small, made):
    """The first answer is written behind the first prompt, the second behind a conversation whose first answer has lost its block."""
    one = FIRST + "<think>\n"
    two = FIRST + "red<|im_end|>\n" + user("And?") + HEADER + "<think>\n"
    three = FIRST + "red<|im_end|>\n" + user("And?") + HEADER + "blue<|im_end|>\n" + user("More?") + HEADER + "<think>\n"
    for name in ("open", "stripped"):
        got = taught(made(name), made(name)([row(small, *TURNS)]))
        assert got == [(one, "it looks red\n</think>\n\nred<|im_end|>"), (two, "then blue\n</think>\n\nblue<|im_end|>"),
                       (three, "many wings\n</think>\n\nbirds<|im_end|>")], name  # fmt: skip


def test_earlier_turns_with_an_empty_block(small, made):
    got = taught(made("empty"), made("empty")([row(small, *TURNS)]))
    earlier = FIRST + "<think></think>\nred<|im_end|>\n" + user("And?") + HEADER + "<think></think>\nblue<|im_end|>\n" + user("More?") + HEADER
    assert got[2] == (earlier, "<think>many wings</think>\nbirds<|im_end|>") and got[0] == (FIRST, "<think>it looks red</think>\nred<|im_end|>")
    # answers without reasoning are alike in every context: one sequence
    batch = made("empty")([row(small, "What?", "red", "And?", "blue")])
    assert len(batch["input_ids"]) == 1
    assert [learned for _, learned in taught(made("empty"), batch)] == ["<think></think>\nred<|im_end|>", "<think></think>\nblue<|im_end|>"]


def test_a_template_that_keeps_all_blocks_gives_one_sequence(small, made):
    batch = made("kept")([row(small, *TURNS)])
    assert len(batch["input_ids"]) == 1
    assert [learned.split("\n")[0] for _, learned in taught(made("kept"), batch)] == ["it looks red", "then blue", "many wings"]


def test_only_answers_whose_context_differs_are_set_apart(small, made):
    """Hybrid: an earlier answer is rendered bare, but written behind its prompt with an empty block: two sequences."""
    got = taught(made("hybrid"), made("hybrid")([row(small, "What?", "red", "And?", "blue")]))
    assert got == [(FIRST, "<think>\n\n</think>\n\nred<|im_end|>"),
                   (FIRST + "red<|im_end|>\n" + user("And?") + HEADER, "<think>\n\n</think>\n\nblue<|im_end|>")]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_plain_transformers(small, made, name):
    """What precedes each answer is what apply_chat_template writes for the conversation before it; so is the prompt in use."""
    own = made(name)
    sample = row(small, "What?", "red", "And?", "blue", "More?", "birds", images=(0, 1))
    contexts = [own.processor.apply_chat_template(sample.messages[:k], add_generation_prompt=True) for k in (1, 3, 5)]
    got = taught(own, own([sample]))
    plain = [c.replace("<|vision_start|><|image_pad|><|vision_end|>" * 2, PICTURE * 2) for c in contexts]
    assert sorted(before for before, _ in got) == sorted(plain)
    ids = own.prompt([sample])["input_ids"][0].tolist()
    assert own.tokenizer.decode(ids).replace("<|image_pad|>" * 6, "<|image_pad|>").replace("<|image_pad|>" * 4, "<|image_pad|>") == plain[-1]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_in_use_is_the_beginning_of_the_last_sequence(small, made, name):
    reasoning = name not in ("closed", "hidden")
    sample = row(small, *(TURNS if reasoning else ("What?", "red", "And?", "blue")))
    batch, prompt = made(name)([sample]), made(name).prompt([sample])
    assert len(prompt["input_ids"]) == 1
    last, head = batch["input_ids"][-1].tolist(), prompt["input_ids"][0].tolist()
    assert last[: len(head)] == head
    assert batch["labels"][-1][len(head)] != IGNORE


def test_each_sequence_shows_the_images_before_its_answer(small, made):
    """Three turns with one picture each: 1, 2 and 3 images, of 4, 6 and 12 tokens."""
    own = made("open")
    messages = [m for n in range(3) for m in (user_turn(1, "What?"), {"role": "assistant", "content": [text_part("red")], "reasoning_content": "it is"})]
    sample = Sample("row", ("0.png", "1.png", "2.png"), messages, ("red",), str(small.root))
    other = row(small, "What?", "blue", images=(2,), id="other")
    batch = own([sample, other])
    counts = (batch["input_ids"] == own.image_token_id).sum(dim=1).tolist()
    assert counts == [4, 4 + 6, 4 + 6 + 12, 12] and batch["row_ids"] == ["row", "row", "row", "other"]
    assert batch["image_grid_thw"].prod(dim=-1).tolist() == [16, 16, 24, 16, 24, 48, 48]
    assert own.prompt([sample, other])["image_grid_thw"].prod(dim=-1).tolist() == [16, 24, 48, 48]


def test_it_is_reported_once(small, made, caplog):
    own = collator(small, TEMPLATES["open"], tokens=THINK)
    with caplog.at_level(logging.INFO, logger="mmft"):
        for _ in range(3):
            own([row(small, *TURNS)])
    assert [r.getMessage() for r in caplog.records if "one sequence for each context" in r.getMessage()] == [caplog.records[0].getMessage()]


def test_reasoning_of_a_template_that_does_not_read_it_is_reported(small, caplog):
    own = collator(small, TEMPLATES["unaware"])
    with caplog.at_level(logging.INFO, logger="mmft"):
        own([row(small, "What?", ("it looks red", "red"))])
    assert "does not read reasoning_content; it is trained as <think>...</think>" in caplog.text


def test_a_template_that_writes_the_first_text_alone(small):
    """Like LLaVA-NeXT's: reasoning and answer reach it as one text, and an answer of two texts is refused."""
    template = TEMPLATES["unaware"].replace("'<|im_start|>assistant\\n' + c", "'<|im_start|>assistant\\n' + m.content[0].text")
    own = collator(small, template)
    assert taught(own, own([row(small, "What?", ("it is red", "red"))])) == [(FIRST, "<think>\nit is red\n</think>\n\nred<|im_end|>")]
    sample = row(small, "What?", "red")
    sample.messages[1]["content"].append(text_part(" and blue"))
    with pytest.raises(RowError, match="^row: the chat template does not write this answer as it is"):
        own([sample])


def test_a_template_that_thinks_only_behind_strings(small):
    """Like Qwen3-Omni's: the last user turn is found only where contents are strings; with lists, reasoning is lost."""
    template = TEMPLATES["open"].replace("{%- if m.role == 'user' -%}{%- set ns.last", "{%- if m.role == 'user' and m.content is string -%}{%- set ns.last")
    template = template.replace("namespace(last=-1)", "namespace(last=messages | length - 1)")
    own = collator(small, template, tokens=THINK)
    assert own.chat.form == "string"
    got = taught(own, own([row(small, "What?", ("it looks red", "red"))]))
    assert got == [(FIRST + "<think>\n", "it looks red\n</think>\n\nred<|im_end|>")]


def test_a_thinking_template_without_end_tokens(small):
    """The model's own end token is put behind each answer that is where it would be generated."""
    template = TEMPLATES["kept"].replace("<|im_start|>assistant\\n", "ASSISTANT:").replace(" + '<|im_end|>\\n' -}}{%- else -%}", " -}}{%- else -%}")
    template = template.replace("</think>\\n\\n' + c + '<|im_end|>\\n' -}}", "</think>\\n\\n' + c -}}")
    own = collator(small, template, tokens=THINK)
    assert own.chat.ending == ""
    got = [learned for _, learned in taught(own, own([row(small, "What?", ("it looks red", "red"), "And?", ("then blue", "blue"))]))]
    assert got == ["it looks red\n</think>\n\nred<|im_end|>", "then blue\n</think>\n\nblue<|im_end|>"]


def test_an_answer_that_repeats_its_reasoning(small, made):
    got = taught(made("open"), made("open")([row(small, "What?", ("red red im_end red", "red"), "And?", ("im_end", "im_end"))]))
    assert [learned for _, learned in got] == ["red red im_end red\n</think>\n\nred<|im_end|>", "im_end\n</think>\n\nim_end<|im_end|>"]


@pytest.mark.parametrize("name", TEMPLATES)
@given(data=st.data())
@examples(15)
def test_any_thinking_conversation(small, made, name, data):
    """Whatever the words: each answer ends its own run of loss, behind exactly the prompt that transformers renders; or RowError."""
    words = st.lists(st.sampled_from(["red", "a", " ", "\n", "<think>", "</think>", "<|im_end|>", "<|im_start|>", "é", "🙂", "4", "."]), min_size=1, max_size=5)
    answers = data.draw(st.lists(st.tuples(words.map("".join), st.none() | words.map("".join)), min_size=1, max_size=3))
    plain = [(w, r) for w, r in answers if w.strip() and "think" not in w and "think" not in (r or "")]
    turns = [t for w, r in answers for t in ("What?", w if r is None else (r, w))]
    own, sample = made(name), row(small, *turns)
    try:
        batch, prompt = own([sample]), own.prompt([sample])
    except RowError as error:
        assert error.row == "row" and (len(plain) < len(answers) or name in ("closed", "hidden"))
        return
    got = taught(own, batch)
    assert len(got) == len(answers) and all(learned.endswith("<|im_end|>") for _, learned in got)
    head = prompt["input_ids"][0].tolist()
    assert batch["input_ids"][-1].tolist()[: len(head)] == head
    if len(plain) == len(answers):
        for (_, learned), (words, reasoning) in zip(got, plain):
            assert learned.removesuffix("<|im_end|>").rstrip().endswith(words.strip())
            assert not reasoning or reasoning.strip() in learned


@pytest.mark.parametrize(
    ("name", "text", "split"),
    [
        ("open", "it looks red\n</think>\n\nred", ("it looks red", "red")),
        ("open", "</think>red", ("", "red")),
        ("open", "it looks red, or", ("it looks red, or", "")),  # cut off before its answer
        ("hybrid", "<think>\nit looks red\n</think>\n\nred", ("it looks red", "red")),
        ("hybrid", "red", ("", "red")),
        ("kimi", "it looks red◁/think▷red", ("it looks red", "red")),
        ("unaware", "a red square", ("", "a red square")),
    ],
)
def test_generated_texts_are_split_for_the_metrics(made, name, text, split):
    assert made(name).split_answer(text, generated=True) == split
    assert made(name).split_answer(split[1]) == ("", split[1]), "a reference is an answer"
