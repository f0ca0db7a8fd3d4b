"""Chat rendering against arbitrary conversations: every answer carries loss as typed, every control token typed stays text, or RowError."""

from unicodedata import normalize

import pytest
from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from mmft.collators.base import IGNORE
from mmft.common.errors import RowError
from mmft.data.sample import Sample
from mmft.models.load import build_collator, load_model

PIECES = ["<image>", "<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>", "</s>", "<s>", "<pad>", "<|endoftext|>", "assistant", "\n", "ASSISTANT:", "USER:", " ",
          "\U000f3c00", "\U000f3c01", "{{", "}}", "{% raw %}", "a", "é", "🙂", "\u200d", "\u0301", "<0x0A>", "▁", "<|im_", "end|>", "\t", "\r\n", "\x00", "red"]  # fmt: skip
words = st.lists(st.sampled_from(PIECES) | st.text(st.characters(codec="utf-8"), max_size=4), min_size=1, max_size=6).map("".join)
FAMILIES = ("qwen2vl", "llava", "llava_vicuna", "blip2")


def collator(small, kind):
    from mmft.config.build import build
    from mmft.models.families.base import Family

    names = {"llava_vicuna": "llava"}
    from omegaconf import OmegaConf

    from mmft.config.groups import CONFIG_DIR

    node = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "model" / f"{names.get(kind, kind)}.yaml"))
    family: Family = build({"_target_": node["_target_"], "path": str(small(kind)), "dtype": "fp32", "device": "cpu"})
    which = "Caption" if kind == "blip2" else "Chat"
    return build_collator({"_target_": f"mmft.collators.{which.lower()}.{which}Collator"}, family, load_model(family))


@pytest.fixture(scope="module")
def collators(small):
    made = {}
    return lambda kind: made.setdefault(kind, None) or made.__setitem__(kind, collator(small, kind)) or made[kind]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    from PIL import Image

    folder = tmp_path_factory.mktemp("fuzz")
    Image.new("RGB", (28, 28), "red").save(folder / "a.png")
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
@given(question=words, answer=words, system=st.none() | words, more=st.none() | st.tuples(words, words))
@examples(40)
def test_any_conversation_is_learned_as_typed_or_refused(collators, picture, kind, question, answer, system, more):
    made = collators(kind)

    def part(text):
        return [{"type": "text", "text": text}]

    messages = [{"role": "system", "content": part(system)}] if system else []
    messages += [{"role": "user", "content": [{"type": "image"}, *part(question)]}, {"role": "assistant", "content": part(answer)}]
    if more:
        messages += [{"role": "user", "content": part(more[0])}, {"role": "assistant", "content": part(more[1])}]
    sample = Sample("row", ("a.png",), messages, (answer,), picture.as_posix())
    try:
        batch = made([sample])
        prompt = made.prompt([sample])
    except RowError as error:
        assert error.row == "row" and error.reason
        return
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    learned = [t for t, label in zip(ids, labels) if label != IGNORE]
    assert all(label in (IGNORE, t) for t, label in zip(ids, labels))
    if kind != "blip2":
        # no more control tokens than the same conversation of harmless words has
        for message in messages:
            for p in message["content"]:
                if p["type"] == "text":
                    p["text"] = "red"
        harmless = made([sample])["input_ids"][0].tolist()
        special = set(made.tokenizer.all_special_ids) | {made.image_token_id}
        assert [t for t in ids if t in special] == [t for t in harmless if t in special]
    ends = [t for t in learned if t == made.end_token_id]
    assert ends, "an answer that never ends"
    last = (more[1] if more else answer).replace("\U000f3c00", "").replace("\U000f3c01", "").strip()
    plain = made.tokenizer.decode(learned, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if kind in ("qwen2vl", "llava") and "\x00" not in last:  # byte-level tokenizers: what is learned is what was typed, to the character
        # (in Unicode's composed form, which Qwen's tokenizer brings every text into)
        assert normalize("NFC", last) in normalize("NFC", plain), (last, plain)
    head = prompt["input_ids"][0].tolist()
    assert ids[: len(head)] == head, "the prompt is not the beginning of the row"
