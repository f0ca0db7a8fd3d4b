"""The patch embedding of the Qwen towers as a matrix product: the same logits as transformers' own model."""

from __future__ import annotations

import pytest
import torch
from small_models import KINDS

from mmft.rewrites.base import Replaced, apply
from mmft.rewrites.patch_embed import PatchEmbed


def convolutions(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.Conv3d)]


def rewritten(model):
    """The convolutions that have a forward of their own; the class stays Conv3d."""
    return [m for m in convolutions(model) if "forward" in vars(m)]


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers_own_model(small, kind):
    from transformers import AutoModelForImageTextToText

    model, collator, _ = small.load(kind)
    stock = AutoModelForImageTextToText.from_pretrained(small(kind)).eval()
    assert {type(m) for m in convolutions(stock) + convolutions(model)} <= {torch.nn.Conv3d} and not rewritten(stock)
    assert rewritten(model) == convolutions(model) and bool(rewritten(model)) == kind.startswith("qwen")
    batch = collator([small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
    with torch.no_grad():
        wanted, got = stock(**inputs).logits, model(**inputs).logits
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert model.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("bias", [False, True])
def test_single_patches_are_multiplied_and_larger_inputs_convolved(dtype, close, bias, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(3, 24, (2, 6, 6), stride=(2, 6, 6), bias=bias).to(dtype))
    single, four = torch.randn(10, 3, 2, 6, 6, dtype=dtype), torch.randn(2, 3, 4, 6, 12, dtype=dtype)
    wanted = model(single), model(four)
    apply(PatchEmbed(), model, replaced := Replaced())
    assert rewritten(model) == [model[0]] and replaced.classes == {"patch_embed": {torch.nn.Conv3d}}
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Conv3d, "forward", lambda *_: pytest.fail("single patches were convolved"))
        got = model(single)
    assert got.shape == wanted[0].shape and (got - wanted[0]).abs().max() <= close
    assert torch.equal(model(four), wanted[1])
    replaced.remove()
    assert not rewritten(model) and torch.equal(model(single), wanted[0])


def test_overlapping_padded_or_grouped_kernels_are_left_alone():
    model = torch.nn.Sequential(
        torch.nn.Conv3d(4, 8, 2, stride=1), torch.nn.Conv3d(4, 8, 2, stride=2, padding=1), torch.nn.Conv3d(4, 8, 2, stride=2, groups=2),
    )  # fmt: skip
    apply(PatchEmbed(), model, replaced := Replaced())
    assert not rewritten(model) and not replaced.classes
