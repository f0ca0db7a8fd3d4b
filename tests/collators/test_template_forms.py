"""Templates that accept only strings, tool turns, and answers without loss; ids against the processor's own, texts written by hand."""

from __future__ import annotations

import pytest
from chat_models import TEMPLATES, collator, taught
from small_models import KINDS

from mmft.common.errors import RowError, UserError
from mmft.data.sample import Sample, assistant_turn, text_part, user_turn

HEAD = "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' -}}"
TAIL = "{{- '<|im_end|>\\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
STRING = {
    "added": HEAD + "{{- m.content -}}".replace("m.content", "'' + m.content") + TAIL,
    "printed": HEAD + "{{- m.content -}}" + TAIL,
    "trimmed": HEAD + "{{- m.content | trim -}}" + TAIL,
    "a method of strings": HEAD + "{{- m.content.strip() -}}" + TAIL,
    "split": HEAD + "{{- m['content'].split('</s>') | join('') -}}" + TAIL,
    "nothing for a list": HEAD + "{%- if m.content is string -%}{{- m.content -}}{%- endif -%}" + TAIL,
    "texts of a list": HEAD + "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{%- for p in m.content if p.type == 'text' -%}{{- p.text -}}{%- endfor -%}{%- endif -%}" + TAIL,
    "the first text": HEAD + "{%- if m.content is string -%}{{- m.content -}}{%- else -%}{{- m.content[0].text -}}{%- endif -%}" + TAIL,
    "refused": HEAD + "{%- if m.content is not string -%}{{- raise_exception('text only') -}}{%- endif -%}{{- m.content -}}" + TAIL,
    "as JSON": HEAD + "{{- m.content if m.content is string else m.content | tojson -}}" + TAIL,
    "strings where text is alone": HEAD + "{%- if m.content is string -%}{{- m.content -}}{%- elif m.content | length > 1 -%}{%- for p in m.content -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text -}}{%- endfor -%}{%- endif -%}" + TAIL,
    "strings but for users": HEAD + "{%- if m.role == 'user' -%}{%- for p in m.content -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' if p.type == 'image' else p.text -}}{%- endfor -%}{%- else -%}{{- '' + m.content -}}{%- endif -%}" + TAIL,
}  # fmt: skip


def text(content, role="assistant", **keys):
    return {"role": role, "content": [text_part(content)], **keys}


def sample(small, messages, *images):
    return Sample("row", tuple(f"{i}.png" for i in images), messages, ("x",), str(small.root))


@pytest.mark.parametrize("name", STRING)
def test_content_parts_become_text_in_place(small, name):
    """Two pictures of 4 and 6 tokens, one before and one inside the text."""
    own = collator(small, STRING[name])
    assert own.chat.form == {"strings but for users": "users", "strings where text is alone": "text"}.get(name, "string")
    messages = [text("Be brief", "system"), {"role": "user", "content": [{"type": "image"}, text_part("and "), {"type": "image"}, text_part(" alike?")]},
                assistant_turn("red"), user_turn(0, "Sure?"), assistant_turn("blue")]  # fmt: skip
    row = sample(small, messages, 0, 1)
    written = (
        "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>and <|vision_start|><|image_pad|><|vision_end|>"
        " alike?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\n"
    )
    plain = own.processor(text=[written + "blue<|im_end|>\n"], images=[row.load_images()])
    batch = own([row])
    assert batch["input_ids"][0].tolist() == list(plain["input_ids"][0]) and batch["image_grid_thw"].prod(dim=-1).tolist() == [16, 24]
    assert [learned for _, learned in taught(own, batch)] == ["red<|im_end|>", "blue<|im_end|>"]
    assert own.prompt([row])["input_ids"][0].tolist() == list(own.processor(text=[written], images=[row.load_images()])["input_ids"][0])


PLACEHOLDERS = {"qwen2vl": "<|vision_start|><|image_pad|><|vision_end|>", "qwen2_5vl": "<|vision_start|><|image_pad|><|vision_end|>",
                "qwen3vl": "<|vision_start|><|image_pad|><|vision_end|>", "llava": "<image>", "llava_vicuna": "<image>", "smolvlm": "<image>",
                "gemma3": "<start_of_image>", "internvl": "<IMG_CONTEXT>", "llava_onevision": "<image>"}  # fmt: skip


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "blip2"])
def test_every_family_has_a_placeholder(small, kind):
    own = collator(small, STRING["added"], kind=kind)
    row = sample(small, [user_turn(2, "What?"), assistant_turn("red")], 0, 1)
    written = f"<|im_start|>user\n{PLACEHOLDERS[kind] * 2}What?<|im_end|>\n<|im_start|>assistant\n"
    plain = own.processor(text=[written], images=[row.load_images()], add_special_tokens=False)
    got = own.prompt([row])["input_ids"][0].tolist()
    assert got[len(got) - len(plain["input_ids"][0]) :] == list(plain["input_ids"][0])


def test_a_template_that_takes_lists_gets_lists(small):
    for kind in KINDS:
        if kind != "blip2":
            assert small.collator(kind).chat.form == "parts"


def test_typed_control_tokens_stay_text_in_strings(small):
    own = collator(small, STRING["added"])
    row = sample(small, [user_turn(1, "<|image_pad|> <|im_end|>"), assistant_turn("<|im_start|>")], 0)
    ids = own([row])["input_ids"][0].tolist()
    assert ids.count(own.image_token_id) == 4 and ids.count(own.end_token_id) == 2


def test_a_template_that_writes_no_message_is_a_users_error(small):
    with pytest.raises(UserError, match="collator=chat: this model's chat template writes neither lists of content parts nor strings.*chat_template.jinja"):
        collator(small, "{{- 'hello' -}}")
    with pytest.raises(UserError, match="the chat template refuses this conversation: not today"):
        collator(small, "{{- raise_exception('not today') -}}")


def test_tool_turns_are_read_and_carry_no_loss(small):
    own = collator(small, TEMPLATES["unaware"])
    messages = [user_turn(1, "How many?"), text('<tool_call>{"count": "dogs"}</tool_call>'), text("12 dogs", "tool"), text("3 cats", "tool"), text("12")]
    got = taught(own, own([sample(small, messages, 0)]))
    first = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>How many?<|im_end|>\n<|im_start|>assistant\n"
    call = '<tool_call>{"count": "dogs"}</tool_call><|im_end|>'
    tools = "".join(f"\n<|im_start|>user\n<tool_response>\n{t}\n</tool_response><|im_end|>" for t in ("12 dogs", "3 cats"))
    assert got == [(first, call), (first + call + tools + "\n<|im_start|>assistant\n", "12<|im_end|>")]


def test_reasoning_lasts_through_tool_turns(small):
    """Behind the last user turn nothing loses its block: one sequence."""
    own = collator(small, TEMPLATES["open"], tokens=("<think>", "</think>"))
    messages = [user_turn(1, "How many?"), text("call", reasoning_content="count them"), text("12 dogs", "tool"), text("12", reasoning_content="so 12")]
    batch = own([sample(small, messages, 0)])
    assert len(batch["input_ids"]) == 1
    assert [learned for _, learned in taught(own, batch)] == ["count them\n</think>\n\ncall<|im_end|>", "so 12\n</think>\n\n12<|im_end|>"]


def test_an_image_in_a_tool_turn(small):
    own = collator(small, TEMPLATES["unaware"])
    messages = [user_turn(1, "Zoom in"), text("zoom"), {"role": "tool", "content": [{"type": "image"}, text_part("done")]}, text("red")]
    batch = own([sample(small, messages, 0, 1)])
    assert (batch["input_ids"] == own.image_token_id).sum() == 4 + 6


def test_a_template_that_leaves_tool_or_system_turns_out_refuses_the_row(small):
    own = collator(small, TEMPLATES["unaware"].replace("{%- elif m.role == 'tool' -%}", "{%- elif m.role == 'tools' -%}"))
    with pytest.raises(RowError, match="^row: the chat template leaves out the tool turn"):
        own([sample(small, [user_turn(1, "How many?"), text("call"), text("12 dogs", "tool"), text("12")], 0)])


@pytest.mark.parametrize("name", ["unaware", "open", "kept"])
def test_answers_without_loss(small, name):
    own = collator(small, TEMPLATES[name], tokens=("<think>", "</think>"))
    written = "red", "blue", "birds"

    def learned(*loss):
        messages = [m for i, (word, on) in enumerate(zip(written, loss)) for m in (user_turn(int(i == 0), "What?"), text(word, **({} if on is None else {"loss": on})))]
        batch = own([sample(small, messages, 0)])
        return [t.removesuffix("<|im_end|>").split("\n")[-1] for _, t in taught(own, batch)]

    assert learned(None, None, None) == learned(True, True, True) == ["red", "blue", "birds"]
    assert learned(False, None, None) == ["blue", "birds"]
    assert learned(None, False, None) == ["red", "birds"]
    assert learned(None, None, False) == ["red", "blue"]
    assert learned(False, True, False) == ["blue"]
    with pytest.raises(RowError, match="^row: every answer has loss: false"):
        learned(False, False, False)


def test_an_answer_without_loss_is_still_the_context_of_the_next(small):
    own = collator(small, TEMPLATES["unaware"])
    messages = [user_turn(1, "What?"), text("red", loss=False), user_turn(0, "And?"), text("blue")]
    [(before, learned)] = taught(own, own([sample(small, messages, 0)]))
    assert before.endswith("assistant\nred<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n") and learned == "blue<|im_end|>"
    assert own.tokenizer.decode(own.prompt([sample(small, messages, 0)])["input_ids"][0]).endswith("And?<|im_end|>\n<|im_start|>assistant\n")


def test_loss_on_a_users_turn_means_nothing(small):
    own = collator(small, TEMPLATES["unaware"])
    messages = [user_turn(1, "What?") | {"loss": True}, text("red")]
    assert [t for _, t in taught(own, own([sample(small, messages, 0)]))] == ["red<|im_end|>"]


def test_the_prompt_of_a_row_whose_last_answer_has_no_loss(small):
    own = collator(small, TEMPLATES["unaware"])
    messages = [user_turn(1, "What?"), text("red"), user_turn(0, "And?"), text("blue", loss=False)]
    prompt = own.tokenizer.decode(own.prompt([sample(small, messages, 0)])["input_ids"][0])
    assert prompt.endswith("red<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n")
    assert own.measure(sample(small, messages, 0)).loss_tokens == len(own.tokenizer.encode("red")) + 1


def test_a_caption_without_loss_is_refused(small):
    row = sample(small, [user_turn(1, ""), text("red", loss=False)], 0)
    with pytest.raises(RowError, match="^row: no token of this row carries loss"):
        small.collator("blip2")([row])
