"""Frozen parts have no active dropout and no gradients, also under activation checkpointing."""

from __future__ import annotations

import pytest
from adapted import adapted, batch
from small_models import KINDS

from mmft.adapters.attach import attach_adapter
from mmft.adapters.freeze import freeze, frozen_parts
from mmft.adapters.plan import plan_adapter
from mmft.losses.supervised import supervised_loss

TOWERS = {"qwen2vl": ["model.visual"], "llava": ["model.vision_tower", "model.multi_modal_projector"], "blip2": ["vision_model", "qformer", "language_projection"]}


def test_frozen_dropout_is_off_while_training_and_lora_dropout_is_on(small):
    """BLIP-2's OPT and Q-Former come with dropout 0.1; two forward passes in train() must agree without LoRA dropout."""
    import torch

    model, collator, _ = adapted(small, "blip2")
    inputs = batch(small, "blip2", collator)
    with torch.no_grad():
        model.train()
        assert supervised_loss(model, inputs)[0] != supervised_loss(model, inputs)[0], "OPT's dropout is active before"
        freeze(model)
        model.train()
        first = supervised_loss(model, inputs)[0]
        assert first == supervised_loss(model, inputs)[0]
        assert first == supervised_loss(model.eval(), inputs)[0]
        dropping, _, rewrites = adapted(small, "blip2", lora_dropout=0.5)
        freeze(dropping)
        dropping.train()
        drawn = supervised_loss(dropping, inputs)[0]
        assert drawn == supervised_loss(dropping, inputs)[0], "the same step draws the same mask, as activation checkpointing needs"
        rewrites.dropout.advance(1, 0, [])
        assert drawn != supervised_loss(dropping, inputs)[0], "the adapter's own dropout"
        dropping.eval()
        assert supervised_loss(dropping, inputs)[0] == supervised_loss(dropping, inputs)[0]


def test_train_and_eval_switch_only_the_adapter(small):
    model, _, _ = adapted(small, "blip2", lora_dropout=0.5)
    freeze(model)
    model.train()
    training = {n for n, m in model.named_modules() if m.training and type(m).__name__ in ("Dropout", "SeededDropout") and m.p > 0}
    assert training and all("lora_dropout" in n for n in training)
    assert model.training
    model.eval()
    assert not any(m.training for m in model.modules())


def test_full_training_keeps_the_dropout_of_the_model(small):
    model, _, _ = small.load("blip2")
    model = attach_adapter(model, plan_adapter(model, {"r": None, "scope": "all"}))
    assert freeze(model) == []
    model.train()
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", TOWERS)
def test_frozen_modules_build_no_graph_under_activation_checkpointing(small, kind):
    model, collator, _ = adapted(small, kind)
    assert sorted(n.removeprefix("base_model.model.") for n in freeze(model)) == sorted(TOWERS[kind])
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()  # what the Trainer and k-bit preparation do: hooks on every embedding
    model.train()
    calls, graphs = [], []

    def watch(module, args, out):
        out = out[0] if isinstance(out, tuple) else getattr(out, "last_hidden_state", out)
        calls.append(module)
        graphs.append(out.grad_fn is not None)  # the library's hook marks the embedding's output itself; nothing may grow on it

    from mmft.common.model_parts import part_of

    for name, module in model.named_modules():
        if part_of(name) in ("vision", "qformer", "connector") and not list(module.children()):
            module.register_forward_hook(watch)
    loss, count = supervised_loss(model, batch(small, kind, collator))
    once = len(calls)
    (loss / count).backward()
    assert once > 4 and not any(graphs), "no frozen module's output carries a graph"
    assert len(calls) == once, "nothing frozen is computed again in the backward pass"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_neither_loss_nor_gradients(small, kind, reentrant):
    results = []
    for checkpointing in (False, True):
        model, collator, _ = adapted(small, kind)
        freeze(model)
        recomputed = []
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        layer = next(m for n, m in model.named_modules() if n.endswith("layers.1") and "visi" not in n and "qformer" not in n)
        norm = next(m for m in layer.modules() if "Norm" in type(m).__name__)
        norm.register_forward_hook(lambda *_, seen=recomputed: seen.append(1))
        model.train()
        loss, count = supervised_loss(model, batch(small, kind, collator))
        (loss / count).backward()
        assert len(recomputed) == (2 if checkpointing else 1), "checkpointing is really on"
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (loss, plain), (again, checkpointed) = results
    assert loss == pytest.approx(again, abs=1e-5)
    for name in plain:
        assert (plain[name] - checkpointed[name]).abs().max() <= 1e-5 * max(1.0, float(plain[name].abs().max())), name


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({}, {"vision", "audio", "qformer", "connector"}),
        ({"scope": "vision"}, {"audio"}),
        ({"scope": "all"}, {"audio"}),
        ({"modules_to_save": ["multi_modal_projector"]}, {"vision", "audio", "qformer"}),
    ],
)
def test_only_parts_before_the_first_trained_one_run_without_gradients(small, settings, frozen):
    model, collator, _ = adapted(small, "llava", **settings)
    assert frozen_parts(model) == frozen
    freeze(model)
    model.train()
    loss, count = supervised_loss(model, batch(small, "llava", collator))
    (loss / count).backward()
    # LLaVA takes the features before CLIP's last layer, so that layer's adapter cannot learn
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and ".layers.1." not in n]
    assert not lost


def test_gradients_are_the_same_with_and_without_freezing(small):
    """no_grad around the tower must not change what the adapter learns."""
    results = []
    for frozen in (False, True):
        model, collator, _ = adapted(small, "qwen2vl")
        if frozen:
            freeze(model)
            model.train()
        loss, count = supervised_loss(model, batch(small, "qwen2vl", collator))
        (loss / count).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name in results[0]:
        assert results[0][name].equal(results[1][name]), name
