"""The completion collator: rows of models without a chat template, against transformers' own processors, models and losses."""

from __future__ import annotations

import pytest
import torch
from model_types import TYPES, load
from small_models import pictures, sample

from mmft.common.errors import RowError, UserError
from mmft.losses.supervised import supervised_loss

ROWS = [(0, "What is this?", "a red square"), (1, "Which colours do you see?", "two dogs and 12 birds")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> (model, collator, family, its folder, a folder with pictures), each made once."""
    root = tmp_path_factory.mktemp("completions")
    folder, known = pictures(root / "pictures"), {}

    def of(kind: str):
        if kind not in known:
            TYPES[kind].build(root / kind)
            known[kind] = (*load(TYPES[kind], root / kind), root / kind, folder)
        return known[kind]

    return of


def rows(folder):
    return [sample(folder, str(i), [image], question, answer) for i, (image, question, answer) in enumerate(ROWS)]


def picture(folder, number: int):
    from PIL import Image

    return Image.open(folder / f"{number}.png").convert("RGB")


def plain(folder):
    """The processor and model as transformers alone loads them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoProcessor.from_pretrained(folder), AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_paligemma_has_the_loss_of_its_processors_suffix(made):
    model, collator, _, folder, images = made("paligemma")
    processor, stock = plain(folder)
    total = 0.0
    for image, question, answer in ROWS:
        inputs = processor(text=f"<image>{question}", images=picture(images, image), suffix=answer, return_tensors="pt")
        count = int((inputs["labels"] != -100).sum())
        with torch.no_grad():
            total += float(stock(**inputs).loss) * count
    with torch.no_grad():
        loss, n = supervised_loss(model, collator(rows(images)))
    assert float(loss) == pytest.approx(total, rel=1e-5) and int(n) > len(ROWS)


def test_paligemma_reads_its_prompt_in_both_directions_and_its_answer_in_one(made):
    _, collator, _, _, images = made("paligemma")
    batch = collator(rows(images))
    supervised = batch["labels"] != -100
    real = batch["attention_mask"].bool()
    assert (batch["token_type_ids"][real] == supervised[real].long()).all()


def test_florence_has_the_loss_of_plain_transformers(made):
    """Labels are `<s> answer </s>`; `<s>` is forced in use, and carries no loss."""
    model, collator, _, folder, images = made("florence2")
    processor, stock = plain(folder)
    total, count = 0.0, 0
    for image, question, answer in ROWS:
        inputs = processor(text=question, images=picture(images, image), return_tensors="pt")
        labels = processor.tokenizer(answer, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = stock(**inputs, labels=labels).logits
        total += float(torch.nn.functional.cross_entropy(logits[0, 1:], labels[0, 1:], reduction="sum"))
        count += labels.shape[1] - 1
    with torch.no_grad():
        loss, n = supervised_loss(model, collator(rows(images)))
    assert int(n) == count and float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind, before", [("chameleon", "<reserved08706>"), ("fuyu", "<0x04>"), ("paligemma", "\n"), ("kosmos-2", None)])
def test_the_answer_follows_what_the_processor_writes(made, kind, before):
    _, collator, _, folder, images = made(kind)
    for row in rows(images):
        ids, labels = (collator([row])[key][0].tolist() for key in ("input_ids", "labels"))
        first = next(i for i, label in enumerate(labels) if label != -100)
        if before is not None:
            assert collator.tokenizer.decode([ids[first - 1]]) == before
        assert collator.decode([[i for i in labels if i != -100]]) == [row.references[0]]
        assert ids[-1] == labels[-1] == collator.end_token_id


def test_boxes_are_tokens_in_answers_and_stay_in_predictions(made):
    _, collator, _, _, images = made("florence2")
    row = sample(images, "boxes", [0], "Where?", "dog<loc_1><loc_7>")
    labels = [i for i in collator([row])["labels"][0].tolist() if i != -100]
    assert collator.tokenizer.convert_ids_to_tokens(labels)[-3:] == ["<loc_1>", "<loc_7>", "</s>"]
    assert collator.decode([labels]) == ["dog<loc_1><loc_7>"]


@pytest.mark.parametrize("kind", ["florence2", "paligemma", "fuyu"])
def test_a_row_is_measured_without_its_pixels(made, kind, monkeypatch):
    _, collator, _, _, images = made(kind)
    for row in rows(images):
        batch = collator([row])
        size = collator.measure(row)
        assert (size.tokens, size.loss_tokens) == (batch["input_ids"].shape[1], int((batch["labels"] != -100).sum()))


@pytest.mark.parametrize("turns, images, reason", [
    (("<image> what?", "red"), [0], "holds <image>"), (("a", "b", "c", "d"), [0], "one question and one answer"),
    (("what?", "red"), [0, 1], "exactly one"), (("what?", "red"), [], "exactly one"),
])  # fmt: skip
def test_rows_that_do_not_fit_are_named(made, turns, images, reason):
    _, collator, _, _, folder = made("florence2")
    with pytest.raises(RowError, match=reason):
        collator([sample(folder, "odd", images, *turns)])


def test_a_prompt_for_all_rows_replaces_their_own(made, tmp_path):
    from mmft.collators.completion import CompletionCollator

    model, collator, family, folder, images = made("paligemma")
    fixed = CompletionCollator(processor=collator.processor, family=family, model_config=model.config, end_token_ids=[1], prompt="caption en")
    text = collator.tokenizer.decode(fixed.prompt(rows(images))["input_ids"][0], skip_special_tokens=True)
    assert text.strip() == "caption en"


def test_a_processor_that_writes_no_image_is_refused(small):
    from transformers import AutoConfig, AutoProcessor

    from mmft.collators.completion import CompletionCollator

    folder = small("llava")
    processor = AutoProcessor.from_pretrained(folder)
    processor.image_token = ""
    with pytest.raises(UserError, match="writes no image into a prompt; use collator=chat"):
        CompletionCollator(processor=processor, family=small.family("llava"), model_config=AutoConfig.from_pretrained(folder), end_token_ids=[1])
