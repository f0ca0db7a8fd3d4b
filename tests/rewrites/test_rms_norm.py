"""RMS norms as one operation: outputs and gradients in fp32 and bf16, and which modules are left alone."""

from __future__ import annotations

import pytest
import torch
from adapted import adapted

from mmft.rewrites.base import Replaced, apply
from mmft.rewrites.rms_norm import RmsNorm


def output_and_gradient(forward, x, gradient):
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(gradient)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 7, 32), (2, 4, 5, 16)])
def test_outputs_and_gradients_match_the_formula_in_double_precision(shape, dtype, close):
    """The error is at most twice that of transformers' own module in the same dtype."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    torch.manual_seed(0)
    norm = Qwen2VLRMSNorm(shape[-1], eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(shape[-1]) + 1)
    x, gradient = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    w = norm.weight.double()
    wanted = output_and_gradient(lambda x: w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt(), x.double(), gradient.double())
    theirs = output_and_gradient(norm, x, gradient)
    apply(RmsNorm(), norm, replaced := Replaced())
    assert replaced.classes == {"rms_norm": {Qwen2VLRMSNorm}}
    ours = output_and_gradient(norm, x, gradient)
    for right, their, our in zip(wanted, theirs, ours):
        assert our.dtype == dtype
        error = (our - right).abs().max()
        assert error <= close * right.abs().max()
        assert error <= 2 * (their - right).abs().max()


@pytest.mark.parametrize("kind, name, norms_of_a_layer", [("qwen2vl", "Qwen2VLRMSNorm", 2), ("qwen3vl", "Qwen3VLTextRMSNorm", 4), ("llava", "Qwen2RMSNorm", 2), ("blip2", None, 0)])
def test_models_with_rms_norms(small, kind, name, norms_of_a_layer):
    model, _, rewrites = adapted(small, kind)
    classes = rewrites.classes.get("rms_norm", set())
    assert {k.__name__ for k in classes} == ({name} if name else set())
    rewritten = [m for m in model.modules() if "forward" in vars(m) and type(m) in classes]
    assert rewritten == [m for m in model.modules() if type(m) in classes]
    layers = model.get_base_model().config.get_text_config().num_hidden_layers
    assert len(rewritten) == (norms_of_a_layer * layers + 1 if name else 0)


def test_in_half_precision_the_input_is_kept_in_its_own_dtype():
    """transformers' own module keeps it in fp32 for the backward pass."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    norm = Qwen2VLRMSNorm(64).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def kept_bytes(forward):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            forward(x)
        return sum(t.untyped_storage().nbytes() for t in kept.values() if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr()))

    assert kept_bytes(norm) >= 4 * 100 * 64
    apply(RmsNorm(), norm, Replaced())
    assert kept_bytes(norm) <= 4 * 100


def test_a_trained_norm_or_another_formula_is_left_alone(small, monkeypatch):
    trained, _, rewrites = adapted(small, "llava", lora_dropout=0.0, modules_to_save=["language_model.norm"])
    assert "forward" not in vars(next(m for n, m in trained.named_modules() if n.endswith("norm.modules_to_save.default")))
    kind = next(type(m) for m in trained.modules() if type(m) in rewrites.classes["rms_norm"])
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) + 0.01)  # as (1 + weight) would be
    assert "rms_norm" not in adapted(small, "llava", lora_dropout=0.0).rewrites.classes
