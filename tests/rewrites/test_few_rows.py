"""Linear layers over few rows by oneDNN: the same values as torch's own product, and torch's own product everywhere else."""

from __future__ import annotations

import pytest
import torch
from small_models import KINDS

from mmft.common.private_api import onednn_linear
from mmft.rewrites import few_rows
from mmft.rewrites.apply import rewrite_loaded

SHAPES = [(1, 40), (2, 40), (8, 40), (9, 40), (64, 40), (4, 1, 40), (3, 5, 40), (2, 2, 3, 40)]


@pytest.fixture
def calls(monkeypatch):
    """The shapes that oneDNN got, on any processor that torch has it for, with weights of any size."""
    plain = onednn_linear()
    if not torch.backends.mkldnn.is_available() or plain is None:
        pytest.skip("this torch has no oneDNN")
    shapes: list[tuple[int, ...]] = []
    monkeypatch.setattr(few_rows, "faster_linear", lambda: lambda x, w, b: (shapes.append(tuple(x.shape)), plain(x, w, b))[1])
    monkeypatch.setattr(few_rows, "SMALLEST", 1)
    return shapes


def layer(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    made = torch.nn.Sequential(torch.nn.Linear(40, 56, bias=bias, dtype=dtype))
    rewrite_loaded(made, "auto")
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_are_those_of_double_precision_for_any_number_of_rows(calls, shape, bias):
    model = layer(bias)
    del calls[:]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    apart = torch.stack([x, torch.zeros_like(x)], dim=-1)[..., 0]  # the same values, not side by side in memory
    own = model[0]
    wanted = torch.nn.functional.linear(x.double(), own.weight.double(), None if own.bias is None else own.bias.double())
    with torch.no_grad():
        for given in (x, apart):
            got = model(given)
            assert got.shape == wanted.shape and (got - wanted).abs().max() <= 1e-5
    rows = x.numel() // 40
    assert calls == [(1 if rows == 1 else (rows + 7) // 8 * 8, 40)] * 2


def test_what_is_not_few_fp32_rows_without_a_gradient_is_torchs_own_product(calls):
    model, half = layer(), layer(dtype=torch.bfloat16)
    del calls[:]
    x = torch.randn(5, 40)
    y = model(x.requires_grad_())
    y.sum().backward()
    assert torch.equal(x.grad, model[0].weight.sum(0).expand(5, 40)) or (x.grad - model[0].weight.sum(0)).abs().max() <= 1e-5
    with torch.no_grad():
        assert model(torch.randn(65, 40)).shape == (65, 56) and model(torch.randn(0, 40)).shape == (0, 56) and half(torch.randn(5, 40).bfloat16()).dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert calls == []


def test_only_large_layers_and_only_on_a_processor_that_gains(monkeypatch):
    small, large = torch.nn.Linear(8, 8), torch.nn.Linear(512, 256)
    for vendor, wanted in (("AuthenticAMD", [large] if torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() else []), ("GenuineIntel", []), ("", [])):
        monkeypatch.setattr(few_rows, "processor_vendor", lambda vendor=vendor: vendor)
        few_rows.faster_linear.cache_clear()
        try:
            model = torch.nn.Sequential(small, large)
            rewrites = rewrite_loaded(model, "auto")
            assert [m for m in model if "forward" in vars(m)] == wanted, vendor
            rewrites.replaced.remove()
            rewrite_loaded(model, "off")
            assert not [m for m in model if "forward" in vars(m)]
        finally:
            few_rows.faster_linear.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_those_of_transformers_own_model(small, kind, calls):
    """A text of few tokens, as a step of decoding is; with an adapter over all layers as well."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    model, collator, _ = small.load(kind)
    stock = AutoModelForImageTextToText.from_pretrained(small(kind)).eval()
    batch = collator([small.sample("a", [0], "What?", "a red square")])
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
    assert calls  # the comparison of each class of layers
    for adapted in (False, True):
        if adapted:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
            torch.manual_seed(0)
            stock = get_peft_model(stock, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
        del calls[:]
        with torch.no_grad():
            wanted, got = stock(**inputs).logits, model(**inputs).logits
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max() and calls
