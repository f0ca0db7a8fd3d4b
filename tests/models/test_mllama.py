"""Llama 3.2 Vision: which tokens read which tiles, against transformers' processor; rows of one image each."""

from __future__ import annotations

import pytest
import torch
from model_types import TYPES, load
from small_models import pictures, sample

from mmft.common.errors import RowError
from mmft.losses.supervised import supervised_logits


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("mllama")
    TYPES["mllama"].build(root / "model")
    return *load(TYPES["mllama"], root / "model"), pictures(root / "pictures")


def rows(folder):
    return [
        sample(folder, "one", [1], "What is this?", "a red square"), sample(folder, "other", [2], "Which colours do you see in it?", "two"),
    ]  # fmt: skip


def test_the_mask_is_the_processors(made):
    from PIL import Image

    _, collator, _, folder = made
    for row in rows(folder):
        batch = collator.prompt([row])
        text = collator.tokenizer.decode(batch["input_ids"][0])
        images = [Image.open(path).convert("RGB") for path in row.image_paths]
        theirs = collator.processor(text=text, images=images, add_special_tokens=False, return_tensors="pt")
        assert batch["input_ids"].tolist() == theirs["input_ids"].tolist()
        assert batch["cross_attention_mask"].tolist() == theirs["cross_attention_mask"].tolist()


def test_no_token_reads_tiles_that_an_image_does_not_fill(made):
    _, collator, _, folder = made
    batch = collator(rows(folder))
    read, filled = batch["cross_attention_mask"].amax(1), batch["aspect_ratio_mask"]
    assert read.tolist() == filled.tolist() and filled.sum(-1).flatten().tolist() == [2, 4]


def test_prompts_of_unequal_length_are_answered_as_alone(made):
    model, collator, _, folder = made
    texts = []
    for group in ([0, 1], [0], [1]):
        batch = collator.prompt([rows(folder)[i] for i in group])
        ids = model.generate(**batch, max_new_tokens=5, do_sample=False, eos_token_id=None)[:, batch["input_ids"].shape[1] :]
        texts += ids.tolist()
    assert texts[:2] == texts[2:]


@pytest.mark.parametrize("images", [[], [0, 2]])
def test_rows_with_other_numbers_of_images_are_refused(made, images):
    """transformers gives the tokens before an image all places of images to read, so such rows would change each other in a batch."""
    _, collator, _, folder = made
    row = sample(folder, "odd", images, "Which?", "second")
    for act in (collator.measure, lambda one: collator([one])):
        with pytest.raises(RowError, match="rows of 1"):
            act(row)


def test_batches_of_unequal_length_are_joined_for_joint_training(made):
    from mmft.joint.stacked_model import stack_batches

    model, collator, _, folder = made
    batches = [collator([row]) for row in rows(folder)]
    for batch in batches:
        batch.pop("row_ids")
    with torch.no_grad():
        joined = supervised_logits(model, stack_batches(batches))[0]
        apart = torch.cat([supervised_logits(model, batch)[0] for batch in batches])
    torch.testing.assert_close(joined, apart, rtol=0, atol=1e-4)
