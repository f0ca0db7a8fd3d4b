"""Rotary embedding in fewer passes: transformers' own values to the bit, its gradients, and nothing of it left behind."""

from __future__ import annotations

import sys

import pytest
import torch
from test_freeze import adapted, batch

from mmft.losses.supervised import supervised_loss
from mmft.rewrites import rotary
from mmft.rewrites.instead import instead


def functions(model):
    return {(module.__name__.rpartition(".")[2], name) for module, name, _ in rotary.ways(model)}


@pytest.mark.parametrize("kind, taken", [
    ("qwen2vl", {("modeling_qwen2_vl", "apply_rotary_pos_emb"), ("modeling_qwen2_vl", "apply_rotary_pos_emb_vision")}),
    ("qwen3vl", {("modeling_qwen3_vl", "apply_rotary_pos_emb"), ("modeling_qwen3_vl", "apply_rotary_pos_emb_vision")}),
    ("llava", {("modeling_qwen2", "apply_rotary_pos_emb")}),
    ("blip2", set()),
])  # fmt: skip
def test_which_models_have_it(small, kind, taken):
    assert functions(small.load(kind)[0]) == taken


@pytest.mark.parametrize("strided", [False, True])
def test_values_are_those_of_transformers_and_gradients_those_of_the_formula(strided):
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    torch.manual_seed(0)
    q, k = (torch.randn(2, 7, heads, 16).transpose(1, 2) if strided else torch.randn(2, heads, 7, 16) for heads in (4, 2))
    cos, sin = torch.randn(2, 7, 16), torch.randn(2, 7, 16)
    gradients = [torch.randn(2, heads, 7, 16) for heads in (4, 2)]

    def through(apply, *tensors):
        q, k, cos, sin = (t.clone() for t in tensors)
        q.requires_grad_(), k.requires_grad_()
        y = apply(q, k, cos, sin)
        torch.autograd.backward(y, [g.to(q.dtype) for g in gradients])
        return [t.detach() for t in y], [q.grad, k.grad]

    def formula(q, k, cos, sin):  # as the paper has it: pairs (x_i, x_{i + d/2}) turned
        def turned(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * c1 - b * s1, b * c2 + a * s2], dim=-1)

        (c1, c2), (s1, s2) = cos.unsqueeze(1).chunk(2, dim=-1), sin.unsqueeze(1).chunk(2, dim=-1)
        return turned(q), turned(k)

    wanted, of_wanted = through(formula, *(t.double() for t in (q, k, cos, sin)))
    stock, _ = through(theirs.apply_rotary_pos_emb, q, k, cos, sin)
    ours, of_ours = through(rotary._language(theirs.apply_rotary_pos_emb), q, k, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(stock, ours))
    for a, b in zip([*wanted, *of_wanted], [*ours, *of_ours]):
        assert b.dtype == torch.float32 and (a - b).abs().max() <= 1e-6 * a.abs().max()


def test_a_tower_is_turned_in_blocks_to_the_bit(monkeypatch):
    from transformers.models.qwen2_vl import modeling_qwen2_vl as theirs

    monkeypatch.setattr(rotary, "BLOCK", 3 * 4 * 16)
    packed = torch.randn(10, 3, 4, 16)
    q, k, _ = packed.permute(1, 0, 2, 3).unbind(0)
    cos, sin = torch.randn(10, 16), torch.randn(10, 16)
    whole = theirs.apply_rotary_pos_emb_vision
    calls = []
    own = rotary._tower(lambda *given: calls.append(1) or whole(*given))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(whole(q, k, cos, sin), own(q, k, cos, sin))) and not calls
    half = [t.bfloat16() for t in (q, k, cos, sin)]
    assert all(torch.equal(a, b) for a, b in zip(whole(*half), own(*half))) and calls, "half precision, or with gradients, is left to transformers"


def test_functions_that_turn_otherwise_are_left_alone(small, monkeypatch):
    model = small.load("llava")[0]
    module = sys.modules["transformers.models.qwen2.modeling_qwen2"]
    whole = module.apply_rotary_pos_emb

    def neighbours(q, k, cos, sin, unsqueeze_dim=1):
        turned = [torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2) for x in (q, k)]
        return tuple(x * cos.unsqueeze(unsqueeze_dim) + t * sin.unsqueeze(unsqueeze_dim) for x, t in zip((q, k), turned))

    for other in (neighbours, lambda q, k, freqs: (q, k), lambda *given: tuple(1.0001 * t for t in whole(*given))):
        monkeypatch.setattr(module, "apply_rotary_pos_emb", other)
        assert functions(model) == set()


@pytest.mark.parametrize("kind", ["qwen2vl", "llava"])
def test_a_training_pass_has_the_same_loss_and_gradients_and_leaves_nothing_behind(small, kind):
    found = {}
    for fewer in (False, True):
        model, collator = adapted(small, kind, lora_dropout=0.0)
        before = [vars(owner)[name] for owner, name, _ in model.ways]
        assert model.ways
        with instead(model.ways if fewer else []):
            loss, _ = supervised_loss(model.train(), batch(small, kind, collator))
            loss.backward()
        assert [vars(owner)[name] for owner, name, _ in model.ways] == before
        found[fewer] = loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-6)
    for name, gradient in found[False][1].items():
        assert (found[True][1][name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-3), name
