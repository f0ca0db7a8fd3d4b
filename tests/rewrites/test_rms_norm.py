"""RMS norms as one operation: transformers' own outputs and gradients, in fp32 and bf16; others than those are left alone."""

from __future__ import annotations

import pytest
import torch
from test_freeze import adapted

from mmft.rewrites import rms_norm


def through(forward, x, gradient):
    x = x.clone().requires_grad_()
    y = forward(x)
    y.backward(gradient)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", [(3, 7, 32), (2, 4, 5, 16)])
def test_outputs_and_gradients_are_those_of_fp64(shape, dtype, close):
    """Against the formula in double precision; transformers' own module, in the same dtype, is no nearer to it."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    torch.manual_seed(0)
    norm = Qwen2VLRMSNorm(shape[-1], eps=1e-3).to(dtype).requires_grad_(False)
    norm.weight.copy_(torch.randn(shape[-1]) + 1)
    x, gradient = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    w = norm.weight.double()
    wanted = through(lambda x: w * x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt(), x.double(), gradient.double())
    theirs = through(norm, x, gradient)
    assert rms_norm.fuse(norm) == {Qwen2VLRMSNorm}
    ours = through(norm, x, gradient)
    for right, their, our in zip(wanted, theirs, ours):
        assert our.dtype == dtype
        error = (our - right).abs().max()
        assert error <= close * right.abs().max()
        assert error <= 2 * (their - right).abs().max()


@pytest.mark.parametrize("kind, name, norms_of_a_layer", [("qwen2vl", "Qwen2VLRMSNorm", 2), ("qwen3vl", "Qwen3VLTextRMSNorm", 4), ("llava", "Qwen2RMSNorm", 2), ("blip2", None, 0)])
def test_which_models_have_them(small, kind, name, norms_of_a_layer):
    model, _ = adapted(small, kind)
    assert {k.__name__ for k in model.normed} == ({name} if name else set())
    taken = [m for m in model.modules() if "forward" in vars(m) and not hasattr(m, "base_layer") and "weight" in dict(m.named_parameters(recurse=False))]
    layers = model.get_base_model().config.get_text_config().num_hidden_layers
    assert len(taken) == (norms_of_a_layer * layers + 1 if name else 0)


def test_in_half_precision_x_is_kept_as_it_came():
    """transformers' own keeps it in fp32 for the backward pass."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    norm = Qwen2VLRMSNorm(64).to(torch.bfloat16).requires_grad_(False)
    x = torch.randn(100, 64, dtype=torch.bfloat16, requires_grad=True)
    kept = {}

    def keeps(forward):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
            forward(x)
        return sum(t.untyped_storage().nbytes() for t in kept.values() if t.data_ptr() not in (x.data_ptr(), norm.weight.data_ptr()))

    assert keeps(norm) >= 4 * 100 * 64
    rms_norm.fuse(norm)
    assert keeps(norm) <= 4 * 100


def test_a_norm_that_is_trained_or_of_another_formula_is_left_alone(small, monkeypatch):
    trained = adapted(small, "llava", lora_dropout=0.0, modules_to_save=["language_model.norm"])[0]
    assert "forward" not in vars(next(m for n, m in trained.named_modules() if n.endswith("norm.modules_to_save.default")))
    kind = next(type(m) for m in trained.modules() if type(m) in trained.normed)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) + 0.01)  # as (1 + weight) would be
    assert adapted(small, "llava", lora_dropout=0.0)[0].normed == set()
