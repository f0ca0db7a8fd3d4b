"""The Qwen towers' convolution over single patches as a product: transformers' own features, in the loaded model and so in every pass."""

from __future__ import annotations

import pytest
import torch
from small_models import KINDS

from mmft.rewrites import patch_embed


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Conv3d)]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers_own_model(small, kind):
    from transformers import AutoModelForImageTextToText

    model, collator, _ = small.load(kind)
    stock = AutoModelForImageTextToText.from_pretrained(small(kind)).eval()
    assert [type(m) for m in convolutions(stock)] == [torch.nn.Conv3d] * len(convolutions(stock))
    assert {type(m) for m in convolutions(model)} == ({patch_embed.PatchProduct} if kind.startswith("qwen") else set())
    batch = collator([small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
    with torch.no_grad():
        wanted, got = stock(**inputs).logits, model(**inputs).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert model.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [False, True])
def test_patches_are_multiplied_and_anything_else_is_convolved(dtype, close, bias, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(3, 24, (2, 6, 6), stride=(2, 6, 6), bias=bias).to(dtype))
    single, four = torch.randn(10, 3, 2, 6, 6, dtype=dtype), torch.randn(2, 3, 4, 6, 12, dtype=dtype)
    wanted = model(single), model(four)
    assert patch_embed.as_products(model) == 1
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv3d, "forward", lambda *_: pytest.fail("single patches were convolved"))
        got = model(single)
    assert got.shape == wanted[0].shape and (got - wanted[0]).abs().max() <= close
    assert torch.equal(model(four), wanted[1])


def test_kernels_that_overlap_pad_or_part_channels_are_left_alone():
    model = torch.nn.Sequential(
        torch.nn.Conv3d(4, 8, 2, stride=1), torch.nn.Conv3d(4, 8, 2, stride=2, padding=1), torch.nn.Conv3d(4, 8, 2, stride=2, groups=2),
    )  # fmt: skip
    assert patch_embed.as_products(model) == 0 and {type(m) for m in model} == {torch.nn.Conv3d}
