"""LoRA products, gated MLPs and the last layer as rewrites: losses and gradients equal those of peft and transformers."""

from __future__ import annotations

import pytest
from adapted import adapted, batch
from small_models import KINDS

from mmft.adapters.freeze import freeze
from mmft.losses.supervised import supervised_loss
from mmft.rewrites.base import Replaced
from mmft.rewrites.last_layer import narrow_if_equal


def measured(model, inputs, checkpointing=False):
    """(loss, gradient by name), in training mode."""
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    loss, _ = supervised_loss(model, inputs)
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def without_rewrites(small, kind, **settings):
    """(model, collator) that computes as peft and transformers do, with the same dropout masks."""
    model, collator, rewrites = adapted(small, kind, **settings)
    rewritten = [m for m in model.modules() if "forward" in vars(m)]
    assert any(hasattr(m, "lora_A") for m in rewritten), "no LoRA layer was rewritten"
    rewrites.remove()
    assert not any("forward" in vars(m) for m in rewritten if hasattr(m, "lora_A"))
    return model, collator


@pytest.mark.parametrize("r, dropout", [(4, 0.0), (4, 0.3), (16, 0.3)])  # a thin product is computed as its transpose
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_those_without_rewrites(small, kind, r, dropout):
    plain, collator = without_rewrites(small, kind, lora_dropout=dropout, r=r)
    inputs = batch(small, kind, collator)
    freeze(plain)
    loss, gradients = measured(plain, inputs)
    for checkpointing in (False, True):
        model, _, rewrites = adapted(small, kind, lora_dropout=dropout, r=r)
        freeze(model)
        rewrites.narrow(model, inputs, lambda compare: compare())
        assert rewrites.positions is not None
        rewritten_loss, rewritten_gradients = measured(model, inputs, checkpointing)
        index = rewrites.positions.index
        assert index is not None and 0 < len(index) < inputs["labels"].numel()
        assert rewritten_loss == pytest.approx(loss, rel=1e-5)
        assert rewritten_gradients.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert (rewritten_gradients[name] - gradient).abs().max() <= 1e-4 * max(gradient.abs().max(), 1e-3), name


def kept_bytes(model, inputs):
    """Bytes that autograd keeps for the backward pass, without weights."""
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


def relative_error(gradients, exact):
    """The norm of the error of all gradients as one vector / the norm of the exact ones."""
    import torch

    error = torch.cat([(gradients[n] - g).flatten().float() for n, g in exact.items()])
    return float(error.norm() / torch.cat([g.flatten().float() for g in exact.values()]).norm())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2"])
def test_fp32_adapters_on_a_half_precision_base_are_rewritten_too(small, kind, dropout):
    """As on a GPU: bf16 weights, fp32 adapters, autocast. Compared with the same weights in fp32: the rewrite errs no more than peft."""
    import torch

    exact, collator = without_rewrites(small, kind, lora_dropout=dropout)
    freeze(exact)
    rewritten, _, _ = adapted(small, kind, dtype="bf16", lora_dropout=dropout)
    freeze(rewritten)
    exact.load_state_dict(rewritten.state_dict())  # the bf16 values, in fp32
    inputs = batch(small, kind, collator)
    exact_loss, exact_gradients = measured(exact, inputs)
    plain, _ = without_rewrites(small, kind, dtype="bf16", lora_dropout=dropout)
    freeze(plain)
    errors = {}
    for name, model in (("rewritten", rewritten), ("peft", plain)):
        calls = calls_of_peft(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss, gradients = measured(model, inputs)
        assert bool(calls) == (name == "peft"), "whether peft's own forward computed the layers"
        assert loss == pytest.approx(exact_loss, rel=2e-2)
        assert all(g.dtype == torch.float32 for g in gradients.values()) and gradients.keys() == exact_gradients.keys()
        errors[name] = relative_error(gradients, exact_gradients)
    assert errors["rewritten"] <= max(0.1, 1.5 * errors["peft"]), "a forgotten factor would give an error of a third"


def calls_of_peft(model):
    """A list that gets an item whenever peft's own forward computes an adapted layer."""
    calls = []
    for layer in model.modules():
        if hasattr(layer, "lora_A"):
            layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_in_half_precision_less_memory_is_kept_and_without_autocast_peft_computes(small):
    import torch

    model, collator, rewrites = adapted(small, "llava", dtype="bf16", lora_dropout=0.3)
    inputs = batch(small, "llava", collator)
    freeze(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        less = kept_bytes(model, inputs)
        assert {k.__name__ for k in rewrites.classes["gated_mlp"]} == {"Qwen2MLP"}
        more = kept_bytes(without_rewrites(small, "llava", dtype="bf16", lora_dropout=0.3)[0], inputs)
    assert less < 0.7 * more

    model, _, rewrites = adapted(small, "llava", dtype="bf16", lora_dropout=0.0)
    calls = calls_of_peft(model)
    with torch.no_grad():
        evaluated = supervised_loss(model.eval(), inputs)[0]
        assert calls, "evaluation computes what later verbs compute"
        rewrites.remove()
        assert evaluated == supervised_loss(model, inputs)[0]


@pytest.mark.parametrize("kind, gated", [("qwen2vl", {"Qwen2MLP"}), ("llava", {"Qwen2MLP"}), ("blip2", set())])
def test_gated_mlps_are_rewritten_and_keep_less_memory(small, kind, gated, monkeypatch):
    """Equality is tested above; here: which models have one, what it saves, and that an MLP with another formula is left alone."""
    model, collator, rewrites = adapted(small, kind, lora_dropout=0.0)
    inputs = batch(small, kind, collator)
    classes = rewrites.classes.get("gated_mlp", set())
    assert {k.__name__ for k in classes} == gated
    mlps = [m for m in model.modules() if type(m) in classes]
    if not gated:
        return
    assert mlps and all("forward" in vars(m) for m in mlps)
    less = kept_bytes(model, inputs)
    for mlp in mlps:
        del mlp.forward
    more = kept_bytes(model, inputs)
    width, tokens = mlps[0].gate_proj.out_features, inputs["input_ids"].numel()
    assert more - less >= 2 * 4 * width * tokens * len(mlps), "two tensors of the inner width, in fp32, in each layer"

    assert "gated_mlp" not in adapted(small, kind, lora_dropout=0.0, lora_bias=True).rewrites.classes, "an adapter that adds more than B A x"
    forward = type(mlps[0]).forward
    monkeypatch.setattr(type(mlps[0]), "forward", lambda self, x: forward(self, x) * 1.01)
    assert "gated_mlp" not in adapted(small, kind, lora_dropout=0.0).rewrites.classes


def test_rewrites_off_leaves_every_module_as_it_is(small):
    """model.rewrites=off, and the state after Rewrites.remove()."""
    import torch

    from mmft.rewrites.apply import rewrite_for_training

    model, collator, rewrites = adapted(small, "qwen2vl", lora_dropout=0.3)
    inputs = batch(small, "qwen2vl", collator)
    rewrites.narrow(model, inputs, lambda compare: compare())
    assert set(rewrites.classes) == {"lora_linear", "gated_mlp", "rms_norm", "last_layer"} and rewrites.positions is not None
    rewrites.remove()
    on_load = {m for m in model.modules() if isinstance(m, torch.nn.Conv3d)}  # rewritten when the model was loaded
    assert {m for m in model.modules() if "forward" in vars(m)} == on_load
    assert not rewrites.classes and rewrites.positions is None
    off = rewrite_for_training(model, "off", 0)
    assert not off.classes and off.dropout is None and off.positions is None
    assert {m for m in model.modules() if "forward" in vars(m)} == on_load
    off_model, _, family = small.load("qwen2vl", rewrites="off")
    assert family.rewrites == "off" and not any("forward" in vars(m) for m in off_model.modules())


def test_generation_and_full_logits_use_the_whole_last_layer(small):
    import torch

    model, collator, _ = adapted(small, "qwen2vl")
    inputs = batch(small, "qwen2vl", collator)
    plain = {k: v for k, v in inputs.items() if k not in ("labels", "row_ids")}
    with torch.no_grad():
        logits = model.eval()(**plain).logits
        positions = narrow_if_equal(model, inputs, Replaced())
        supervised_loss(model, inputs)
        assert positions.index is not None
        assert torch.equal(model(**plain).logits, logits) and positions.index is None


def test_a_model_that_reads_other_positions_keeps_its_last_layer_whole(small, monkeypatch):
    """The comparison detects a model that reads other positions of the last layer; here a norm mixes positions."""
    model, collator, _ = adapted(small, "llava")
    inputs = batch(small, "llava", collator)
    top = model.get_base_model()
    norm = next(m for n, m in top.named_modules() if n.endswith("language_model.norm"))
    whole = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: whole(x + x.mean(dim=1, keepdim=True)))
    loss = supervised_loss(model.eval(), inputs)[0].item()
    assert narrow_if_equal(model, inputs, Replaced()) is None
    assert supervised_loss(model, inputs)[0].item() == loss
