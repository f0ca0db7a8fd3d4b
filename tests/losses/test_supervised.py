"""The loss: equal to transformers' own for every family, a mean over supervised tokens, and no step with a NaN."""

from __future__ import annotations

import pytest
from small_models import KINDS

from mmft.adapters.attach import attach_adapter
from mmft.adapters.plan import plan_adapter
from mmft.collators.base import IGNORE
from mmft.common.errors import UserError
from mmft.losses.supervised import RowGroups, check_sum, grouped_loss, sequence_losses, supervised_loss, takes_logits_to_keep


def rows(small, kind):
    if kind == "blip2":
        return [small.sample("a", [0], "What?", "a red square"), small.sample("b", [1], "", "blue")]
    return [
        small.sample("a", [0], "What is in the picture?", "a red square", "And?", "birds"),
        small.sample("b", [1, 2], "Which?", "blue"),
        small.sample("c", [], "Two dogs", "3 cats"),
    ]


def grads(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_those_of_transformers(small, kind):
    model, collator, _ = small.load(kind)
    batch = collator(rows(small, kind))
    loss, count = supervised_loss(model, batch)
    assert int(count) == int((batch["labels"] != IGNORE).sum())
    (loss / count).backward()
    ours = grads(model)
    model.zero_grad()
    inputs = {k: v for k, v in batch.items() if k != "row_ids"}
    if kind == "blip2":  # its own loss shifts inside; labels at the image's places are IGNORE
        inputs["labels"] = batch["labels"]
    plain = model(**inputs, use_cache=False).loss
    plain.backward()
    theirs = grads(model)
    assert (loss / count).item() == pytest.approx(plain.item(), abs=1e-5)
    assert ours.keys() == theirs.keys() and any("vision" in n or "visual" in n for n in ours)
    scale = max(g.abs().max() for g in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("kind", ["qwen2vl", "blip2"])
def test_a_weight_multiplies_the_loss_and_the_gradient_of_its_tokens(small, kind):
    """Against a sum over tokens in double precision, from all logits of plain transformers; also by group."""
    import torch

    model, collator, _ = small.load(kind)
    batch = collator(rows(small, kind))
    labels = batch["labels"]
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) * (labels != IGNORE)
    groups = RowGroups(torch.arange(len(labels)), len(labels))
    loss, count, by_group = grouped_loss(model, {**batch, "loss_weights": weights}, groups=groups)
    loss.backward()
    ours = grads(model)
    model.zero_grad()
    inputs = {k: v for k, v in batch.items() if k not in ("row_ids", "labels")}
    chances = model(**inputs, use_cache=False).logits.double().log_softmax(-1)
    each = [
        sum((-weights[row, i].double() * chances[row, i - 1, labels[row, i]] for i in range(1, labels.shape[1]) if labels[row, i] != IGNORE), torch.tensor(0.0).double())
        for row in range(len(labels))
    ]
    plain = sum(each, torch.tensor(0.0).double())
    plain.backward()
    theirs = grads(model)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5) and int(count) == int((labels != IGNORE).sum()), "the count is that of tokens"
    assert by_group[:, 0].tolist() == pytest.approx([one.item() for one in each], rel=1e-5)
    scale = max(g.abs().max() for g in theirs.values())
    assert all((ours[name] - theirs[name]).abs().max() <= 1e-5 * scale for name in theirs)
    whole = grouped_loss(model, {**batch, "loss_weights": (labels != IGNORE).float()})[0]
    assert whole.item() == pytest.approx(supervised_loss(model, batch)[0].item(), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_computed_only_for_supervised_positions(small, kind):
    import torch
    from transformers import modeling_utils

    model, collator, _ = small.load(kind)
    if not hasattr(modeling_utils, "slice_logits_to_keep"):
        assert not takes_logits_to_keep(model)
        pytest.skip("before transformers 5.21 heads take no mask of positions; all logits are computed there")
    batch = collator(rows(small, kind))
    seen = []
    head = model.get_output_embeddings() or model.language_model.lm_head
    head.register_forward_hook(lambda module, args, out: seen.append(out.shape[:-1].numel()))
    with torch.no_grad():
        _, count = supervised_loss(model, batch)
    assert takes_logits_to_keep(model)
    assert seen == [int(count)], "the head gets only the supervised positions"


@pytest.mark.parametrize("kind", KINDS)
def test_two_images_give_two_losses(small, kind):
    """A model that ignores its image would give the same."""
    import torch

    model, collator, _ = small.load(kind)
    with torch.no_grad():
        losses = []
        for image in (0, 2):
            row = small.sample("a", [0], "What?" if kind != "blip2" else "", "a red square")
            object.__setattr__(row, "images", ("1.png",) if image else ("0.png",))
            if kind.startswith("qwen") or kind == "internvl":  # the same number of tokens for both
                import numpy as np
                from PIL import Image

                name = f"flat{image}.png"
                Image.fromarray(np.full((56, 56, 3), 30 + 90 * image, dtype="uint8")).save(small.root / name)
                object.__setattr__(row, "images", (name,))
            losses.append(supervised_loss(model, collator([row]))[0].item())
    assert abs(losses[0] - losses[1]) > 1e-4


def test_a_model_without_logits_to_keep_gives_the_same_loss(small):
    import torch

    model, collator, _ = small.load("llava")

    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask, pixel_values, use_cache):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=use_cache)

    batch = collator([small.sample("a", [0], "What?", "a red square")])
    with torch.no_grad():
        few, all_ = supervised_loss(model, batch)[0], supervised_loss(Plain(model), batch)[0]
    assert not takes_logits_to_keep(Plain(model))
    assert few.item() == pytest.approx(all_.item(), abs=1e-5)


def test_label_smoothing_equals_that_of_torch(small):
    import torch

    model, collator, _ = small.load("llava")
    batch = collator([small.sample("a", [0], "What?", "a red square")])
    with torch.no_grad():
        smooth, count = supervised_loss(model, batch, 0.1)
        inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
        logits = model(**inputs, use_cache=False).logits[0, :-1]
    labels = batch["labels"][0, 1:]
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE, label_smoothing=0.1)
    assert (smooth / count).item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_group_is_that_of_its_rows_alone(small, kind, smoothing):
    """Rows with one image, two and none in a batch; every group but the first has one row."""
    import torch

    model, collator, _ = small.load(kind)
    samples = rows(small, kind)
    place = {sample.id: n for n, sample in enumerate(samples)}
    batch = collator(samples)
    groups = RowGroups(torch.tensor([place[row] for row in batch["row_ids"]]), len(samples) + 1)
    with torch.no_grad():
        whole, count, sums = grouped_loss(model, batch, smoothing, groups)
        alone = [supervised_loss(model, collator([sample]), smoothing) for sample in samples]
    assert sums[-1].tolist() == [0, 0], "a group without rows"
    assert sums[:-1, 1].tolist() == [int(n) for _, n in alone] and int(sums[:, 1].sum()) == int(count)
    assert sums[:-1, 0].tolist() == pytest.approx([loss.item() for loss, _ in alone], rel=1e-4)
    assert float(sums[:, 0].sum()) == pytest.approx(whole.item(), rel=1e-5)
    assert whole.item() == supervised_loss(model, batch, smoothing)[0].item(), "groups change no bit of the loss"
    with pytest.raises(RuntimeError, match="add up to"):
        check_sum(float(sums[0, 0]), whole.item())


# --- in the Trainer -------------------------------------------------------------------------------------------------


def trainer(small, tmp_path, samples, collator=None, **settings):
    from mmft.adapters.freeze import freeze
    from mmft.rewrites.apply import rewrite_for_training
    from mmft.training.arguments import training_settings
    from mmft.training.callbacks import FiniteStep
    from mmft.training.trainer import SupervisedTrainer

    model, own, _ = small.load("qwen2vl")
    import torch

    torch.manual_seed(0)
    adapted = attach_adapter(model, plan_adapter(model, {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}))
    rewrites = rewrite_for_training(adapted, "auto", 0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    freeze(adapted)
    settings = {"max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no",
                "logging_nan_inf_filter": False, "dataloader_pin_memory": False, "logging_steps": 1, **settings}  # fmt: skip
    args, callbacks = training_settings(
        settings, output_dir=str(tmp_path), seed=1, data_seed=1, report_to=[], remove_unused_columns=False, label_names=["labels"], use_cpu=True
    )
    trainer = SupervisedTrainer(
        model=adapted, args=args, rows=samples, held_out=None, collator=collator or own, processor=None, callbacks=callbacks, rewrites=rewrites
    )
    trainer.add_callback(FiniteStep(trainer, "stop", 0))
    return trainer


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_accumulated_micro_batches_step_like_one_batch(small, tmp_path):
    """2 x 2 rows of very different lengths: the mean over tokens, not over batches."""
    samples = [
        small.sample("1", [0], "What?", "red"),
        small.sample("2", [1], "Which colours do you see?", "a red square and a blue circle stand on the grass"),
        small.sample("3", [2], "And?", "12 birds"),
        small.sample("4", [0], "More?", "Two dogs, 3 cats and 12 birds."),
    ]
    one = trainer(small, tmp_path / "one", samples, per_device_train_batch_size=4)
    two = trainer(small, tmp_path / "two", samples, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    start = weights(one.model)
    one.train(), two.train()
    whole, halves = weights(one.model), weights(two.model)
    assert max((whole[n] - start[n]).abs().max() for n in start) > 1e-3, "the step changed the weights"
    for n in start:  # learning rate 0.1: a gradient's difference of 1e-6 is 1e-7 here
        assert (whole[n] - halves[n]).abs().max() <= 1e-7, n
    assert int(one.meter.supervised_tokens) == int(two.meter.supervised_tokens) > 0
    assert one.state.log_history[0]["loss"] == pytest.approx(two.state.log_history[0]["loss"], abs=1e-5)


def test_the_logged_loss_is_the_mean_over_tokens(small, tmp_path):
    import torch

    samples = [small.sample("1", [0], "What?", "red"), small.sample("2", [1], "Which?", "a red square and a blue circle")]
    run = trainer(small, tmp_path, samples, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    with torch.no_grad():
        parts = [supervised_loss(run.model.eval(), small.collator("qwen2vl")([s])) for s in samples]
    expected = sum(loss.item() for loss, _ in parts) / sum(int(n) for _, n in parts)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, abs=1e-3)


def test_a_non_finite_loss_stops_before_the_step_and_names_the_rows(small, tmp_path):
    collator = small.collator("qwen2vl")

    def poisoned(samples):
        batch = collator(samples)
        if "bad" in batch["row_ids"]:
            batch["pixel_values"][0] = float("nan")
        return batch

    samples = [small.sample(i, [0], "What?", "red") for i in ("good", "bad", "fine")]
    run = trainer(small, tmp_path, samples, poisoned, per_device_train_batch_size=3, max_steps=2)
    start = weights(run.model)
    with pytest.raises(UserError, match=r"step 1: the loss is not finite.*(good|bad|fine), .*the weights of step 0 are untouched") as caught:
        run.train()
    assert "bad" in str(caught.value) and "\n" not in str(caught.value)
    for name, now in weights(run.model).items():
        assert now.equal(start[name]), name


def test_a_non_finite_gradient_with_a_finite_loss_stops_too(small, tmp_path):
    samples = [small.sample("only", [0], "What?", "red")]
    run = trainer(small, tmp_path, samples, per_device_train_batch_size=1)
    name, parameter = next((n, p) for n, p in run.model.named_parameters() if p.requires_grad)
    parameter.register_hook(lambda g: g * float("inf"))
    start = weights(run.model)
    with pytest.raises(UserError, match="step 1: the gradient is not finite.*only"):
        run.train()
    assert all(now.equal(start[n]) for n, now in weights(run.model).items())


def test_the_losses_of_sequences_in_a_batch_are_those_of_each_alone(small):
    import torch

    model, collator, _ = small.load("qwen2vl")
    rows = [small.sample("1", [0], "What?", "red"), small.sample("2", [1], "Which?", "a red square and a blue circle")]
    with torch.no_grad():
        together = sequence_losses(model.eval(), collator(rows))
        alone = [supervised_loss(model, collator([row])) for row in rows]
    assert [n for _, n in together] == [int(n) for _, n in alone] and len({n for _, n in together}) == 2
    assert [loss for loss, _ in together] == pytest.approx([loss.item() for loss, _ in alone], rel=1e-5)
