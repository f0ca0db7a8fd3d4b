"""Special tokens that belong to an answer: encoded as tokens in assistant texts, kept by decode; text elsewhere unless listed."""

from __future__ import annotations

import pytest
from chat_models import TEMPLATES, collator
from places import shared
from small_models import QWEN

from mmft.collators.base import IGNORE
from mmft.collators.chat import ChatCollator
from mmft.common.errors import UserError
from mmft.data.sample import Sample, assistant_turn, user_turn

# (tokens in the vocabulary, an answer that holds them), as grounding, pointing, counting and OCR models write them
ANSWERS = {
    "Qwen2-VL": (("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
                 "<|object_ref_start|>the dog<|object_ref_end|><|box_start|>(10,20),(30,40)<|box_end|>"),
    "InternVL": (("<ref>", "</ref>", "<box>", "</box>"), "<ref>a dog</ref><box>[[1, 2, 3, 4]]</box>"),
    "Qwen's quadrangles": (("<|quad_start|>", "<|quad_end|>"), "text <|quad_start|>(1,2),(3,4),(5,6),(7,8)<|quad_end|>"),
    "PaliGemma": (tuple(f"<loc{n:04d}>" for n in range(4)), "<loc0001><loc0002><loc0003><loc0001> dog"),
    "Florence-2": (("<loc_1>", "<loc_2>", "<ocr>", "</ocr>"), "<ocr>STOP</ocr><loc_1><loc_2>"),
    "Kosmos-2": (("<phrase>", "</phrase>", "<object>", "</object>", "<patch_index_0001>"), "<phrase>a dog</phrase><object><patch_index_0001></object>"),
    "GLM-4.5V": (("<|begin_of_box|>", "<|end_of_box|>"), "The answer is <|begin_of_box|>12<|end_of_box|>"),
    "DeepSeek-VL2": (("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"), "<|grounding|><|ref|>a dog<|/ref|><|det|>[[1, 2, 3, 4]]<|/det|>"),
    "points": (("<point>", "</point>"), "<point>12, 30</point>"),
    "segments": (("[SEG]",), "It is [SEG]."),
    "tables": (("<fcel>", "<ecel>", "<nl>"), "<fcel>red<ecel><nl>"),
    "music": (("<|note|>",), "a <|note|><|note|> b"),
}  # fmt: skip


def row(small, question, answer):
    return Sample("row", ("0.png",), [user_turn(1, question), assistant_turn(answer)], (answer,), str(small.root))


def learned(batch):
    return [label for label in batch["labels"][0].tolist() if label != IGNORE]


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_is_encoded_as_plain_transformers_encodes_it(small, name):
    tokens, answer = ANSWERS[name]
    own = collator(small, TEMPLATES["unaware"], special=tokens)
    ids = learned(own([row(small, f"Where? {answer}", answer)]))
    assert ids == own.tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    assert sum(i in own.tokenizer.convert_tokens_to_ids(list(tokens)) for i in ids) == sum(answer.count(t) for t in tokens) > 0
    assert own.decode([ids]) == [answer], "kept, and the end token dropped"


@pytest.mark.parametrize("name", ANSWERS)
def test_in_a_users_text_they_are_text_unless_listed(small, name):
    tokens, answer = ANSWERS[name]
    numbers = set(collator(small, TEMPLATES["unaware"], special=tokens).tokenizer.convert_tokens_to_ids(list(tokens)))
    for listed in ((), tokens[:1], tokens):
        own = collator(small, TEMPLATES["unaware"], special=tokens, prompt_tokens=list(listed))
        ids = own([row(small, answer, "red")])["input_ids"][0].tolist()
        assert sum(i in numbers for i in ids) == sum(answer.count(t) for t in listed)
        assert answer in own.tokenizer.decode(ids), "the same characters either way"


def test_only_the_listed_tokens_are_an_answers(small):
    tokens, answer = ANSWERS["Qwen2-VL"]
    own = collator(small, TEMPLATES["unaware"], special=tokens, answer_tokens=list(tokens[2:]))
    ids = learned(own([row(small, "Where?", answer)]))
    numbers = own.tokenizer.convert_tokens_to_ids(list(tokens))
    assert [ids.count(n) for n in numbers] == [0, 0, 1, 1]
    assert own.decode([own.tokenizer(answer, add_special_tokens=False)["input_ids"]]) == ["the dog<|box_start|>(10,20),(30,40)<|box_end|>"]
    none = collator(small, TEMPLATES["unaware"], special=tokens, answer_tokens=[])
    assert none.decode([own.tokenizer(answer, add_special_tokens=False)["input_ids"]]) == ["the dog(10,20),(30,40)"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"answer_tokens": "none"}, "collator.answer_tokens=none: must be auto, or a list of special tokens"),
        ({"answer_tokens": ["<|box_strat|>"]}, r"collator.answer_tokens: '<\|box_strat\|>' is not a special token of this model. Did you mean <\|box_start\|>\?"),
        ({"answer_tokens": ["<|im_end|>"]}, r"collator.answer_tokens: <\|im_end\|> opens or closes a turn or stands for an image"),
        ({"answer_tokens": ["<|image_pad|>"]}, r"collator.answer_tokens: <\|image_pad\|> opens or closes"),
        ({"prompt_tokens": ["<|vision_start|>"]}, r"collator.prompt_tokens: <\|vision_start\|> opens or closes"),
        ({"prompt_tokens": ["dog"]}, "collator.prompt_tokens: 'dog' is not a special token"),
    ],
)
def test_wrong_keys_are_refused(small, keys, message):
    with pytest.raises(UserError, match=message):
        collator(small, TEMPLATES["unaware"], special=ANSWERS["Qwen2-VL"][0], **keys)


FRAME = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|video_pad|>",
         "<|vision_pad|>", "<|user|>", "<|begin_of_text|>", "<|eot_id|>", "<s>", "</s>", "<pad>", "<image>", "<row_1_col_2>", "<global-img>",
         "<end_of_utterance>", "<start_of_turn>")  # fmt: skip


def test_tokens_of_turns_and_pixels_are_never_an_answers(small):
    """Also those that the chat template does not use."""
    template = TEMPLATES["unaware"].replace("'<|im_start|>' + m.role + '\\n' + c", "'<|im_start|><|user|>' + c")
    own = collator(small, template, special=FRAME)
    ids = learned(own([row(small, "What?", f"red {' '.join(FRAME)} dogs")]))
    special = {i for i, t in own.tokenizer.added_tokens_decoder.items() if t.special}
    assert [i for i in ids if i in special] == [own.end_token_id]
    assert own.decode([[*own.tokenizer.convert_tokens_to_ids(list(FRAME)), *own.tokenizer("red")["input_ids"]]]) == ["red"]


def test_tokens_that_are_not_special_are_an_answers_too(small):
    """<tool_call> is no special token of Qwen's, but its template writes it."""
    own = collator(small, TEMPLATES["unaware"], tokens=("<tool_response>", "</tool_response>", "<tool_call>", "</tool_call>"))
    number = own.tokenizer.convert_tokens_to_ids("<tool_call>")
    assert learned(own([row(small, "What?", "<tool_call>{}</tool_call>")])).count(number) == 1


def test_a_think_block_of_special_tokens(small):
    own = collator(small, TEMPLATES["open"], special=("<think>", "</think>"))
    ids = learned(own([row(small, "What? </think>", "<think>\nit is\n</think>\n\nred")]))
    assert ids.count(own.tokenizer.convert_tokens_to_ids("</think>")) == 1
    assert own.decode([ids]) == ["it is\n</think>\n\nred"]


def test_the_published_vocabulary_of_qwen2vl(tmp_path):
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Qwen2VLProcessor, Qwen2VLVideoProcessor

    from mmft.models.families.qwen2vl import Qwen2VL

    folder = shared("published/Qwen2-VL-2B-Instruct")
    processor = Qwen2VLProcessor(
        image_processor=AutoImageProcessor.from_pretrained(folder), tokenizer=AutoTokenizer.from_pretrained(folder),
        video_processor=Qwen2VLVideoProcessor(), chat_template=QWEN,
    )  # fmt: skip
    own = ChatCollator(processor=processor, family=Qwen2VL(path="x"), model_config=AutoConfig.from_pretrained(folder), end_token_ids=[151645, 151643])
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    answer = "<|object_ref_start|>dog<|object_ref_end|><|box_start|>(1,2)<|box_end|>"
    batch = own([Sample("row", ("a.png",), [user_turn(1, "<|box_start|>"), assistant_turn(answer)], (answer,), str(tmp_path))])
    ids = learned(batch)
    # their numbers, from the list of added tokens in the published tokenizer.json
    assert [i for i in ids if i >= 151643] == [151646, 151647, 151648, 151649, 151645]
    assert batch["input_ids"][0].tolist().count(151648) == 1, "not the one that the user typed"
    assert own.decode([ids]) == [answer]


@pytest.mark.parametrize("kind", ["qwen2vl", "llava_vicuna", "gemma3", "smolvlm", "internvl"])
def test_decode_is_that_of_transformers_for_models_without_such_tokens(small, kind):
    own = small.collator(kind)
    ids = own.tokenizer(" a red square\n é🙂 12 ", add_special_tokens=False)["input_ids"] + own.tokenizer.all_special_ids
    assert own.decode([ids, ids[:3]]) == [t.strip() for t in own.tokenizer.batch_decode([ids, ids[:3]], skip_special_tokens=True, clean_up_tokenization_spaces=False)]
