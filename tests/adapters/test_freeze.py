"""What is frozen is frozen: no dropout, no gradients through it, also under activation checkpointing."""

from __future__ import annotations

import pytest
from small_models import KINDS

from mmft.adapters.freeze import freeze, frozen_parts
from mmft.adapters.lora import attach, plan
from mmft.losses.supervised import supervised_loss

LANGUAGE = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear", "scope": "language"}
TOWERS = {"qwen2vl": ["model.visual"], "llava": ["model.vision_tower", "model.multi_modal_projector"], "blip2": ["vision_model", "qformer", "language_projection"]}


def adapted(small, kind, dtype="fp32", **settings):
    import torch

    model, collator, _ = small.load(kind, dtype=dtype)
    torch.manual_seed(0)
    made = attach(model, plan(model, {**LANGUAGE, **settings}))
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made, collator


def batch(small, kind, collator):
    return collator([small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "Which?", "blue")])


def test_frozen_dropout_is_off_while_training_and_lora_dropout_is_on(small):
    """BLIP-2's OPT and Q-Former come with dropout 0.1; two forward passes in train() must agree without LoRA dropout."""
    import torch

    model, collator = adapted(small, "blip2")
    inputs = batch(small, "blip2", collator)
    with torch.no_grad():
        model.train()
        assert supervised_loss(model, inputs)[0] != supervised_loss(model, inputs)[0], "OPT's dropout is alive before"
        freeze(model)
        model.train()
        first = supervised_loss(model, inputs)[0]
        assert first == supervised_loss(model, inputs)[0]
        assert first == supervised_loss(model.eval(), inputs)[0]
        dropping, _ = adapted(small, "blip2", lora_dropout=0.5)
        freeze(dropping)
        dropping.train()
        drawn = supervised_loss(dropping, inputs)[0]
        assert drawn == supervised_loss(dropping, inputs)[0], "drawn anew for the same step, as checkpointing does, it is the same"
        dropping.dropout_stream.at = (1, 0)
        assert drawn != supervised_loss(dropping, inputs)[0], "the adapter's own dropout"
        dropping.eval()
        assert supervised_loss(dropping, inputs)[0] == supervised_loss(dropping, inputs)[0]


def test_train_and_eval_switch_the_adapter_alone(small):
    model, _ = adapted(small, "blip2", lora_dropout=0.5)
    freeze(model)
    model.train()
    training = {n for n, m in model.named_modules() if m.training and type(m).__name__ in ("Dropout", "SeededDropout") and m.p > 0}
    assert training and all("lora_dropout" in n for n in training)
    assert model.training
    model.eval()
    assert not any(m.training for m in model.modules())


def test_full_training_keeps_the_models_own_dropout(small):
    model, _, _ = small.load("blip2")
    made = attach(model, plan(model, {"r": None, "scope": "all"}))
    assert freeze(made) == []
    made.train()
    assert all(m.training for m in made.modules())


@pytest.mark.parametrize("kind", TOWERS)
def test_the_frozen_tower_makes_no_graph_under_activation_checkpointing(small, kind):
    model, collator = adapted(small, kind)
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
        model, collator = adapted(small, kind)
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
        ({}, {"vision", "qformer", "connector"}),
        ({"scope": "vision"}, set()),
        ({"scope": "all"}, set()),
        ({"modules_to_save": ["multi_modal_projector"]}, {"vision", "qformer"}),
    ],
)
def test_only_what_lies_before_the_first_trained_part_is_cut_off(small, settings, frozen):
    model, collator = adapted(small, "llava", **settings)
    assert frozen_parts(model) == frozen
    freeze(model)
    model.train()
    loss, count = supervised_loss(model, batch(small, "llava", collator))
    (loss / count).backward()
    # LLaVA takes the features before CLIP's last layer, so that layer's adapter cannot learn
    lost = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and ".layers.1." not in n]
    assert not lost


def test_gradients_are_those_of_the_unfrozen_way(small):
    """no_grad around the tower must not change what the adapter learns."""
    results = []
    for way in (False, True):
        model, collator = adapted(small, "qwen2vl")
        if way:
            freeze(model)
            model.train()
        loss, count = supervised_loss(model, batch(small, "qwen2vl", collator))
        (loss / count).backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for name in results[0]:
        assert results[0][name].equal(results[1][name]), name
