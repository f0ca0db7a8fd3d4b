"""Preference losses: their values by hand from the papers' formulas, their gradients by differences, and TRL's own where it is installed.

Every number expected here is computed from the formula in double precision with math alone, or by TRL; nothing is copied from mmft.
"""

from __future__ import annotations

import math

import pytest
import torch
from small_models import KINDS

from mmft.collators.answers import CHOSEN, REJECTED, AnswerCollator, other_answers
from mmft.common.errors import UserError
from mmft.losses import preference
from mmft.losses.answers import AnswerParts, answer_log_probs, mismatched_log_ratios, objective_loss, take_answers
from mmft.losses.objectives import Answers, Dpo, Ipo, Kto, Mpo, Orpo, SimPo

# log-probabilities of three pairs, of the policy and the reference, and the tokens of each answer
CHOSEN_P, REJECTED_P = [-3.2, -0.7, -41.0], [-2.9, -5.5, -40.0]
CHOSEN_R, REJECTED_R = [-4.0, -0.9, -39.5], [-2.5, -4.8, -44.0]
CHOSEN_N, REJECTED_N = [4, 1, 37], [3, 6, 29]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_hand(name: str, beta: float = 0.3) -> list[float]:
    """The loss of each pair."""
    rows = list(zip(CHOSEN_P, REJECTED_P, CHOSEN_R, REJECTED_R, CHOSEN_N, REJECTED_N))
    cross_entropy = -sum(CHOSEN_P) / sum(CHOSEN_N)
    values = []
    for c, r, rc, rr, n, m in rows:
        if name == "dpo":
            values.append(-math.log(sigmoid(beta * math.log((math.exp(c) / math.exp(rc)) / (math.exp(r) / math.exp(rr))))))
        elif name == "ipo":
            values.append(((c - rc) / n - (r - rr) / m - 1 / (2 * beta)) ** 2)
        elif name == "simpo":
            values.append(-math.log(sigmoid(beta * c / n - beta * r / m - 0.4)))
        elif name == "orpo":
            p, q = math.exp(c / n), math.exp(r / m)
            values.append(cross_entropy - beta * math.log(sigmoid(math.log((p / (1 - p)) / (q / (1 - q))))))
        elif name == "mpo":
            dpo = -math.log(sigmoid(beta * ((c - rc) - (r - rr))))
            quality = -math.log(sigmoid(beta * (c - rc))) - math.log(sigmoid(-beta * (r - rr)))
            values.append(0.8 * dpo + 0.2 * quality + 1.0 * cross_entropy)
    return values


def answers(dtype=torch.float64, requires_grad=False) -> Answers:
    """Interleaved, as an AnswerCollator lays them out."""
    def pairs(a, b, **kind):
        return torch.tensor([x for pair in zip(a, b) for x in pair], **kind)

    policy = pairs(CHOSEN_P, REJECTED_P, dtype=dtype, requires_grad=requires_grad)
    return Answers(policy, pairs(CHOSEN_R, REJECTED_R, dtype=dtype), pairs(CHOSEN_N, REJECTED_N), torch.tensor([CHOSEN, REJECTED] * 3))


OBJECTIVES = {"dpo": Dpo(beta=0.3), "ipo": Ipo(beta=0.3), "simpo": SimPo(beta=0.3, gamma=0.4), "orpo": Orpo(beta=0.3), "mpo": Mpo(beta=0.3)}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_are_those_of_the_formulas(name):
    assert OBJECTIVES[name].losses(answers()).tolist() == pytest.approx(by_hand(name), rel=1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_are_the_slopes_of_the_formulas(name):
    found = answers(requires_grad=True)
    OBJECTIVES[name].losses(found).sum().backward()
    step = 1e-6
    for i, values in enumerate((CHOSEN_P, REJECTED_P)):
        for n in range(3):
            values[n] += step
            above = sum(by_hand(name))
            values[n] -= 2 * step
            below = sum(by_hand(name))
            values[n] += step
            assert found.policy.grad[2 * n + i].item() == pytest.approx((above - below) / (2 * step), rel=1e-4, abs=1e-7), (name, i, n)


def test_kto_with_good_and_bad_answers_and_its_estimate():
    kind = torch.tensor([CHOSEN, REJECTED, CHOSEN])
    policy, reference = torch.tensor([-3.0, -2.0, -1.0], dtype=torch.float64, requires_grad=True), torch.tensor([-3.5, -2.5, -0.8], dtype=torch.float64)
    mismatched = torch.tensor([0.9, -0.3, 0.6], dtype=torch.float64, requires_grad=True)
    objective = Kto(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7)
    losses = objective.losses(Answers(policy, reference, torch.tensor([2, 2, 2]), kind, mismatched))
    z = 0.4
    expected = [1.5 * (1 - sigmoid(0.5 * (0.5 - z))), 0.7 * (1 - sigmoid(0.5 * (z - 0.5))), 1.5 * (1 - sigmoid(0.5 * (-0.2 - z)))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-9)
    losses.sum().backward()
    assert mismatched.grad is None, "the estimate is a number, not something to train"
    slope = 1.5 * -0.5 * sigmoid(0.05) * (1 - sigmoid(0.05))
    assert policy.grad[0].item() == pytest.approx(slope, rel=1e-9)
    assert preference.mismatched_kl(torch.tensor([-3.0, 1.0])).item() == 0.0, "never below 0"


def test_the_odds_of_probabilities_near_0_and_1_are_finite():
    x = torch.tensor([-1e-12, -1e-4, -0.6931, -0.6932, -30.0, 0.0], dtype=torch.float64, requires_grad=True)
    found = preference.log_one_minus_exp(x)
    expected = [math.log(-math.expm1(v)) for v in (-1e-12, -1e-4, -0.6931, -0.6932)] + [math.log1p(-math.exp(-30.0))]
    assert found[:5].tolist() == pytest.approx(expected, rel=1e-9)
    found.sum().backward()
    assert torch.isfinite(found).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("make", [lambda: Dpo(beta=0), lambda: SimPo(gamma=-1), lambda: Kto(desirable_weight=float("inf")), lambda: Mpo(beta=float("nan"))])
def test_numbers_that_cannot_be_are_refused(make):
    with pytest.raises(UserError, match=r"objective\.\w+=.*must be"):
        make()


# --- on models ----------------------------------------------------------------------------------------------------


def rows(small):
    """Three pairs: unequal lengths, one row of two images."""
    from dataclasses import replace

    first = small.sample("a", [0], "What is in the picture?", "a red square")
    second = small.sample("b", [1], "Which colours do you see?", "blue")
    third = small.sample("c", [1, 2], "Describe", "Two dogs, 3 cats")
    return [replace(first, rejected="birds"), replace(second, rejected="a blue circle and a red square"), replace(third, rejected="3 cats")]


def adapted(small, kind):
    """(model with an adapter that is not zero, collator, log-probabilities of the base)."""
    from mmft.adapters.attach import attach_adapter
    from mmft.adapters.plan import plan_adapter
    from mmft.evaluation.preferences import reference_log_probs

    model, collator, _ = small.load(kind)
    own = rows(small)
    answers_of = AnswerCollator(collator, other_answers(own))
    answers_of.reference = reference_log_probs(model, answers_of, own, 2, False)
    plan = plan_adapter(model, {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "scope": "language"})
    torch.manual_seed(3)
    tuned = attach_adapter(model, plan)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return tuned.eval(), answers_of, own


def ours(objective, model, collator, own):
    """(loss, gradients)."""
    model.zero_grad()
    batch = dict(collator(own))
    batch.pop("row_ids")
    parts = take_answers(batch)
    from mmft.losses.supervised import supervised_logits

    found = objective_loss(objective, parts, *supervised_logits(model, batch), mismatched_log_ratios(model, parts))
    loss = found.total / found.units
    loss.backward()
    return loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one, other, bound=1e-5):
    assert one[0] == pytest.approx(other[0], abs=bound)
    assert one[1].keys() == other[1].keys() and one[1]
    scale = max(float(g.abs().max()) for g in other[1].values())
    assert scale > 0
    for name, gradient in other[1].items():
        assert float((one[1][name] - gradient).abs().max()) <= bound * max(scale, 1), name


def whole(model, batch):
    """Log-probabilities of the answers by plain transformers: all logits, one sequence after another."""
    logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "row_ids")}, use_cache=False).logits.float()
    values = []
    for row, labels in zip(logits, batch["labels"]):
        places = [i for i in range(1, len(labels)) if labels[i] != -100]
        values.append(sum(row[i - 1].log_softmax(-1)[labels[i]] for i in places))
    return torch.stack(values)


@pytest.mark.parametrize("kind", ["qwen2vl", "llava"])
def test_dpo_on_a_model_is_the_formula_over_plain_logits(small, kind):
    """Loss and gradients against plain transformers: full logits, the adapter switched off for the reference, the formula of the paper."""
    model, collator, own = adapted(small, kind)
    found = ours(Dpo(beta=0.3), model, collator, own)
    model.zero_grad()
    batch = collator.collator([answer for row in own for answer, _ in collator.answers(row)])
    policy = whole(model, batch)
    with torch.no_grad(), model.disable_adapter():
        reference = whole(model, batch)
    ratios = policy - reference
    loss = -torch.log(torch.sigmoid(0.3 * (ratios[0::2] - ratios[1::2]))).mean()
    loss.backward()
    assert_same(found, (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_that_is_its_own_reference_has_the_loss_log_2(small, kind):
    """In every family: what is computed before training, answer by answer, is what a batch of training computes."""
    from dataclasses import replace

    from mmft.evaluation.preferences import reference_log_probs
    from mmft.losses.supervised import supervised_logits

    model, collator, _ = small.load(kind)
    prompt = "" if kind == "blip2" else "What?"
    own = [replace(small.sample("a", [0], prompt, "a red square"), rejected="birds"), replace(small.sample("b", [1], prompt, "blue"), rejected="Two dogs, 3 cats")]
    answers_of = AnswerCollator(collator)
    answers_of.reference = reference_log_probs(model, answers_of, own, 1, False)
    batch = dict(answers_of(own))
    batch.pop("row_ids")
    parts = take_answers(batch)
    with torch.no_grad():
        found = objective_loss(Dpo(beta=1.0), parts, *supervised_logits(model.eval(), batch))
    assert (found.total / found.units).item() == pytest.approx(math.log(2), abs=1e-5) and float(parts.reference.std()) > 0.01


def test_rows_without_hashes_of_their_images_are_refused(small):
    from types import SimpleNamespace

    from mmft.pipeline.preferences import usable_rows

    settings = {"trainer": {}, "augment": None, "evaluation": {"split": "validation"}}
    with pytest.raises(UserError, match="objective=dpo: somewhere: row a has no hashes of its images; remove the set"):
        usable_rows(Dpo(), SimpleNamespace(manifest={"name": "x"}, path="somewhere"), rows(small), None, settings)


def test_log_probs_of_answers_do_not_depend_on_the_batch(small):
    model, collator, own = adapted(small, "qwen2vl")
    with torch.no_grad():
        together = answer_log_probs(model, {k: v for k, v in collator(own).items() if k != "row_ids"})
        alone = torch.cat([answer_log_probs(model, {k: v for k, v in collator([row]).items() if k != "row_ids"}) for row in own])
    assert together.tolist() == pytest.approx(alone.tolist(), abs=1e-5)


# --- TRL ----------------------------------------------------------------------------------------------------------

TRL_DPO = {"dpo": (Dpo(beta=0.3), {"loss_type": ["sigmoid"]}), "ipo": (Ipo(beta=0.3), {"loss_type": ["ipo"]}),
           "mpo": (Mpo(beta=0.3), {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]})}  # fmt: skip


def trl_inputs(batch):
    """Our batch as TRL's trainers take it."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "row_ids")}
    return {**inputs, "completion_mask": (batch["labels"] != -100).long()}


def trl_dataset():
    import datasets
    from PIL import Image

    turn = [{"role": "user", "content": "What?"}]
    return datasets.Dataset.from_list([{"images": [Image.new("RGB", (56, 56))], "prompt": turn, "chosen": [{"role": "assistant", "content": "blue"}],
                                        "rejected": [{"role": "assistant", "content": "birds"}]}] * 2)  # fmt: skip


def without_copy(trainer):
    """The trainer's model without the copy of its adapter that TRL would take for the reference: then it is the model with its adapter off."""
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    return trainer.model.eval()


@pytest.mark.parametrize("kind", ["qwen2vl", "llava"])
@pytest.mark.parametrize("name", TRL_DPO)
def test_losses_and_gradients_of_pairs_equal_trls(small, tmp_path, kind, name):
    trl = pytest.importorskip("trl", reason="TRL is not installed; the formulas above stand for it")
    objective, keys = TRL_DPO[name]
    model, collator, own = adapted(small, kind)
    found = ours(objective, model, collator, own)
    model.zero_grad()
    args = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=None, **keys)
    trainer = trl.DPOTrainer(model=model, args=args, train_dataset=trl_dataset(), processing_class=collator.processor)
    both = [collator.answers(row) for row in own]
    batch = collator.collator([pair[0][0] for pair in both] + [pair[1][0] for pair in both])
    loss = trainer._compute_loss(without_copy(trainer), trl_inputs(batch), False)
    loss.backward()
    assert_same(found, (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))


@pytest.mark.parametrize("kind", ["qwen2vl", "llava"])
def test_loss_and_gradients_of_kto_equal_trls(small, tmp_path, kind):
    from dataclasses import replace

    trl = pytest.importorskip("trl", reason="TRL is not installed; the formulas above stand for it")
    model, collator, own = adapted(small, kind)
    own = [replace(row, rejected="", label=n != 1) for n, row in enumerate(own)]
    collator.others = other_answers(own)
    from mmft.evaluation.preferences import reference_log_probs

    with model.disable_adapter():
        collator.reference = reference_log_probs(model, collator, own, 3, False)
    found = ours(Kto(beta=0.3, undesirable_weight=0.7), model, collator, own)
    model.zero_grad()
    data = trl_dataset().rename_column("chosen", "completion").remove_columns("rejected").add_column("label", [True, False])
    args = trl.KTOConfig(output_dir=str(tmp_path), beta=0.3, undesirable_weight=0.7, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
                         max_length=None, per_device_train_batch_size=2)  # fmt: skip
    trainer = trl.KTOTrainer(model=model, args=args, train_dataset=data, processing_class=collator.processor)
    batch = collator.collator([collator.answers(row)[0][0] for row in own])
    other = trl_inputs(collator.collator([collator.mismatched(row)[0] for row in own]))
    names = ("input_ids", "attention_mask", "completion_mask", "mm_token_type_ids")
    inputs = {**trl_inputs(batch), **{f"KL_{k}": other[k] for k in names if k in other}, "label": torch.tensor([True, False, True])}
    loss = trainer._compute_loss(without_copy(trainer), inputs, False)
    loss.backward()
    assert_same(found, (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))


@pytest.mark.parametrize("kind", ["qwen2vl", "llava"])
@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_equal_trls(small, kind, name):
    """TRL's trainers of these two take no images, so their loss functions are given log-probabilities of plain transformers."""
    from types import SimpleNamespace

    pytest.importorskip("trl", reason="TRL is not installed; the formulas above stand for it")
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    model, collator, own = adapted(small, kind)
    collator.reference = {}
    found = ours(OBJECTIVES[name], model, collator, own)
    model.zero_grad()
    batch = collator.collator([answer for row in own for answer, _ in collator.answers(row)])
    policy, tokens = whole(model, batch), (batch["labels"][:, 1:] != -100).sum(1)
    mean = policy / tokens
    keys = {"accelerator": SimpleNamespace(device="cpu"), "beta": 0.3, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.4, "loss_type": "simpo"}
    if name == "simpo":
        loss = CPOTrainer.cpo_loss(SimpleNamespace(**keys), mean[0::2], mean[1::2])[0].mean()
    else:  # the cross entropy of the answers, as in the paper; TRL's trainer adds that of the prompts
        loss = -policy[0::2].sum() / tokens[0::2].sum() - ORPOTrainer.odds_ratio_loss(SimpleNamespace(**keys), mean[0::2], mean[1::2])[0].mean()
    loss.backward()
    assert_same(found, (loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))


def test_parts_of_a_batch_are_taken_out_once(small):
    _, collator, own = adapted(small, "llava")
    batch = collator(own)
    size = collator.measure(own[1])
    assert (size.tokens, size.sequences) == (int(batch["attention_mask"][2:4].sum(1).max()), 2), "what trainer.tokens_per_batch counts"
    assert batch["row_ids"] == ["a", "a", "b", "b", "c", "c"] and batch["answer_kind"].tolist() == [1, 0] * 3
    parts = take_answers(batch)
    assert isinstance(parts, AnswerParts) and take_answers(batch) is None and len(parts.reference) == 6
    assert other_answers(own) == {"a": ["Two dogs, 3 cats", "3 cats"], "b": ["a red square", "birds"], "c": ["blue", "a blue circle and a red square"]}
