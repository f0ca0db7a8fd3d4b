"""One operation for a layer and its adapter, and a last layer that computes what is read: peft's and the whole layer's losses and gradients."""

from __future__ import annotations

import pytest
from small_models import KINDS
from test_freeze import adapted, batch

from mmft.adapters.freeze import freeze
from mmft.losses.supervised import supervised_loss
from mmft.rewrites import last_layer


def measured(model, inputs, checkpointing=False):
    """(loss, gradient by name), in training mode."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    loss, _ = supervised_loss(model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def unfused(model):
    """peft's own way through its layers, and transformers' through the MLPs."""
    taken = [m for m in model.modules() if m.__dict__.pop("forward", None)]
    assert any(hasattr(m, "lora_A") for m in taken), "no layer was computed as one operation"
    return model


@pytest.mark.parametrize("r, dropout", [(4, 0.0), (4, 0.3), (16, 0.3)])  # a thin product is computed as its transpose
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_peft_over_the_whole_last_layer(small, kind, r, dropout):
    wanted, collator = adapted(small, kind, lora_dropout=dropout, r=r)
    inputs = batch(small, kind, collator)
    freeze(unfused(wanted))
    loss, gradients = measured(wanted, inputs)
    for checkpointing in (False, True):
        model, _ = adapted(small, kind, lora_dropout=dropout, r=r)
        freeze(model)
        places = last_layer.checked(model, inputs)
        assert places is not None
        got, found = measured(model, inputs, checkpointing)
        assert places.index is not None and 0 < len(places.index) < inputs["labels"].numel()
        assert got == pytest.approx(loss, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (found[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-3), name


def kept_bytes(model, inputs):
    """Of what autograd keeps for the backward pass, weights left out."""
    import torch

    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = supervised_loss(model, inputs)
    del loss
    return sum(kept.values())


def distance(found, wanted):
    """Of all gradients taken as one vector, by the length of what it should be."""
    import torch

    off, whole = (torch.cat([g.flatten().float() for g in gs]) for gs in ([found[n] - g for n, g in wanted.items()], list(wanted.values())))
    return float(off.norm() / whole.norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2"])
def test_fp32_adapters_on_a_half_precision_base_are_one_operation_too(small, kind, dropout):
    """As a GPU trains: bf16 weights, fp32 adapters, autocast. Against the same weights in fp32, as near as peft's way through autocast is."""
    import torch

    def made(dtype, fused=True):
        model, collator = adapted(small, kind, dtype=dtype, lora_dropout=dropout)
        freeze(model if fused else unfused(model))
        return model, collator

    exact, collator = made("fp32", fused=False)
    rounded, _ = made("bf16")
    exact.load_state_dict(rounded.state_dict())  # what bf16 holds, in fp32
    inputs = batch(small, kind, collator)
    loss, wanted = measured(exact, inputs)
    far = {}
    for fused in (True, False):
        model = rounded if fused else made("bf16", fused=False)[0]
        calls = counted(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, found = measured(model, inputs)
        assert bool(calls) == (not fused), "layers that peft computed"
        assert got == pytest.approx(loss, rel=2e-2)
        assert all(g.dtype == torch.float32 for g in found.values()) and found.keys() == wanted.keys()
        far[fused] = distance(found, wanted)
    assert far[True] <= max(0.1, 1.5 * far[False]), "a factor forgotten would be a third"


def counted(model):
    """The adapted layers that are computed by peft's own forward, as they are computed."""
    called = []
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["default"].register_forward_hook(lambda *_: called.append(1))
    return called


def test_in_half_precision_less_is_kept_and_without_autocast_peft_computes(small):
    import torch

    model, collator = adapted(small, "llava", dtype="bf16", lora_dropout=0.3)
    inputs = batch(small, "llava", collator)
    freeze(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        less = kept_bytes(model, inputs)
        assert {k.__name__ for k in model.gated} == {"Qwen2MLP"}
        more = kept_bytes(unfused(adapted(small, "llava", dtype="bf16", lora_dropout=0.3)[0]), inputs)
    assert less < 0.7 * more

    model, _ = adapted(small, "llava", dtype="bf16", lora_dropout=0.0)
    calls = counted(model)
    with torch.no_grad():
        measuring = supervised_loss(model.eval(), inputs)[0]
        assert calls, "what is measured is what later verbs compute"
        assert measuring == supervised_loss(unfused(model), inputs)[0]


@pytest.mark.parametrize("kind, gated", [("qwen2vl", {"Qwen2MLP"}), ("llava", {"Qwen2MLP"}), ("blip2", set())])
def test_a_gated_mlp_is_one_operation_and_keeps_less(small, kind, gated, monkeypatch):
    """Equality is tested above; here: which models have one, what it saves, and that one of another formula is left alone."""
    model, collator = adapted(small, kind, lora_dropout=0.0)
    inputs = batch(small, kind, collator)
    assert {k.__name__ for k in model.gated} == gated
    mlps = [m for m in model.modules() if type(m) in model.gated]
    if not gated:
        return
    assert mlps and all("forward" in vars(m) for m in mlps)
    less = kept_bytes(model, inputs)
    for mlp in mlps:
        del mlp.forward
    more = kept_bytes(model, inputs)
    width, tokens = mlps[0].gate_proj.out_features, inputs["input_ids"].numel()
    assert more - less >= 2 * 4 * width * tokens * len(mlps), "two tensors of the inner width, in fp32, in each layer"

    assert adapted(small, kind, lora_dropout=0.0, lora_bias=True)[0].gated == set(), "an adapter that adds more than B A x"
    forward = type(mlps[0]).forward
    monkeypatch.setattr(type(mlps[0]), "forward", lambda self, x: forward(self, x) * 1.01)
    assert adapted(small, kind, lora_dropout=0.0)[0].gated == set()


def test_generation_and_full_logits_are_computed_whole(small):
    import torch

    model, collator = adapted(small, "qwen2vl")
    inputs = batch(small, "qwen2vl", collator)
    plain = {k: v for k, v in inputs.items() if k not in ("labels", "row_ids")}
    with torch.no_grad():
        wanted = model.eval()(**plain).logits
        places = last_layer.checked(model, inputs)
        supervised_loss(model, inputs)
        assert places.index is not None
        assert torch.equal(model(**plain).logits, wanted) and places.index is None


def test_a_model_that_reads_more_than_the_head_is_left_whole(small, monkeypatch):
    """A last layer whose other positions are read after all (here: mixed by a norm over positions) shows in the comparison."""
    model, collator = adapted(small, "llava")
    inputs = batch(small, "llava", collator)
    top = model.get_base_model()
    norm = next(m for n, m in top.named_modules() if n.endswith("language_model.norm"))
    whole = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: whole(x + x.mean(dim=1, keepdim=True)))
    loss = supervised_loss(model.eval(), inputs)[0].item()
    assert last_layer.checked(model, inputs) is None
    assert supervised_loss(model, inputs)[0].item() == loss
