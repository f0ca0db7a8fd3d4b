"""Choosing by likelihood: the numbers against plain transformers for every family, normalisation, order of the choices, calibration."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from small_models import CAPTIONS, KINDS, MORE

from mmft.data.sample import assistant_turn
from mmft.evaluation import likelihood
from mmft.evaluation.choose import Chooser, chosen
from mmft.evaluation.metrics.calibration import Calibration

CHOICES = ("a red square", "two dogs", "a", "What is in the picture, and which colours do you see?")
OTHERS = ("blue", "two dogs", "12 birds", "a photo of a red square")
FAST = ("qwen2vl", "llava_vicuna", "blip2", "gemma3", "blip2_t5")  # one of each way: M-RoPE, rope, learned positions, sliding window, encoder-decoder
ENCODERS = ("blip2_t5", "instructblip_t5")


def kinds(fast=FAST):
    return [kind if kind in fast else pytest.param(kind, marks=pytest.mark.long) for kind in (*KINDS, *MORE)]


def rows(small):
    """Two rows of one length with different choices, which are computed together; a larger picture; another number of choices."""
    made = [small.sample(str(n), [image], "What is this?", "two dogs") for n, image in enumerate((0, 0, 1, 2))]
    return [replace(row, choices=c) for row, c in zip(made, (CHOICES, OTHERS, CHOICES, CHOICES[:2]), strict=True)]


def plain_likelihood(model, collator, row, text):
    """transformers' own loss of the row with this answer alone, times its tokens."""
    import torch

    batch = {k: v for k, v in collator([replace(row, messages=[*row.messages[:-1], assistant_turn(text)])]).items() if k != "row_ids"}
    labels = batch["labels"]
    count = int((labels != -100).sum())
    if model.config.get_text_config().is_encoder_decoder or getattr(model.config.text_config, "is_encoder_decoder", False):
        first = int((labels[0] != -100).nonzero()[0])
        batch |= {k: batch[k][:, :first] for k in ("input_ids", "attention_mask")} | {"labels": labels[:, first:]}
    with torch.no_grad():
        return -model.eval()(**batch, use_cache=False).loss.item() * count, count


@pytest.mark.parametrize("kind", kinds())
def test_likelihoods_equal_plain_transformers_row_by_row(small, kind, monkeypatch):
    model, collator, _ = small.load(kind, dtype="fp32", device="cpu")
    calls = []
    whole = likelihood.shared
    monkeypatch.setattr(likelihood, "shared", lambda model, prompt, answers: calls.append(len(answers)) or whole(model, prompt, answers))
    chooser, given = Chooser(batch_size=8), rows(small)
    found = chooser.options(model, collator, given)
    assert chooser.shares is True and sum(calls) == 1 + len(given), "the first row once more, to compare; then each row in one batch"
    assert max(calls) >= 2, "rows of one length together"
    for row, options in zip(given, found, strict=True):
        assert set(options) == set(row.choices)
        for text, option in options.items():
            expected, count = plain_likelihood(model, collator, row, text)
            assert option.likelihood == pytest.approx(expected, rel=1e-5, abs=1e-5) and option.tokens == count
    assert len({round(o["two dogs"].likelihood, 3) for o in found[:3:2]}) == 2, "the picture is seen"


@pytest.mark.parametrize("kind", kinds(("llava",)))
def test_the_order_of_the_choices_changes_no_bit(small, kind):
    model, collator, _ = small.load(kind, dtype="fp32", device="cpu")
    given = rows(small)
    turned = [replace(row, choices=tuple(random.Random(n).sample(row.choices, len(row.choices)))) for n, row in enumerate(given)]
    assert [t.choices for t in turned] != [g.choices for g in given]
    for norm in ("none", "prior"):
        first, second = (Chooser(norm, batch_size=8).probabilities(model, collator, r) for r in (given, turned))
        assert first == second and [list(p) for p in second] == [list(t.choices) for t in turned]
        assert all(sum(p.values()) == pytest.approx(1) for p in first)


def test_equal_probabilities_are_decided_by_text_alone():
    assert chosen({"b": 0.5, "a": 0.5}) == chosen({"a": 0.5, "b": 0.5}) == "a"


@pytest.mark.parametrize("kind", kinds(("llava", "blip2", "blip2_t5")))
def test_normalised_by_token_by_character_and_by_prior(small, kind):
    import torch

    model, collator, _ = small.load(kind, dtype="fp32", device="cpu")
    row = rows(small)[0]
    [options] = Chooser().options(model, collator, [row])

    def without_picture(text):
        """The text behind the prompt alone: by the whole model for chat models, by the language model for BLIP-2."""
        if kind not in CAPTIONS:
            bare = replace(row, images=(), messages=[{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}, row.messages[-1]])
            return plain_likelihood(model, collator, bare, text)[0]
        batch = collator([replace(row, messages=[*row.messages[:-1], assistant_turn(text)])])
        seen = batch["labels"][0] != -100
        text_ids = batch["input_ids"][0][batch["input_ids"][0] != collator.image_token_id]
        answer = batch["labels"][0][seen]
        with torch.no_grad():
            if kind in ENCODERS:
                out = model.language_model(input_ids=text_ids[None, : -len(answer)], labels=answer[None])
            else:
                out = model.language_model(input_ids=text_ids[None], labels=torch.cat([torch.full_like(text_ids[: -len(answer)], -100), answer])[None])
        return -out.loss.item() * len(answer)

    expected = {
        "none": lambda text, o: o.likelihood, "token": lambda text, o: o.likelihood / o.tokens, "character": lambda text, o: o.likelihood / len(text),
        "prior": lambda text, o: o.likelihood - without_picture(text),
    }  # fmt: skip
    results = {}
    for norm, score in expected.items():
        weights = {text: math.exp(score(text, o)) for text, o in options.items()}
        [found] = Chooser(norm).probabilities(model, collator, [row])
        assert found == pytest.approx({text: w / sum(weights.values()) for text, w in weights.items()}, rel=1e-4), norm
        results[norm] = tuple(found.values())
    assert len(set(results.values())) == 4


def test_more_choices_than_one_batch_holds(small, monkeypatch):
    model, collator, _ = small.load("llava", dtype="fp32", device="cpu")
    row = replace(rows(small)[0], choices=tuple(f"{n} dogs" for n in range(7)))
    [together] = Chooser().options(model, collator, [row])
    monkeypatch.setattr(likelihood, "AT_ONCE", 3)
    chooser = Chooser()
    [apart] = chooser.options(model, collator, [row])
    assert chooser.shares and {t: o.likelihood for t, o in apart.items()} == pytest.approx({t: o.likelihood for t, o in together.items()}, rel=1e-6)


@pytest.mark.parametrize("fault", ["raises", "differs"])
def test_a_model_that_cannot_continue_from_a_shared_prompt_is_computed_whole(small, monkeypatch, caplog, fault):
    model, collator, _ = small.load("qwen2vl", dtype="fp32", device="cpu")
    given = rows(small)
    expected = [{t: o.likelihood for t, o in options.items()} for options in Chooser().options(model, collator, given)]
    whole = likelihood.shared

    def broken(model, prompt, answers):
        if fault == "raises":
            raise TypeError("forward() got an unexpected keyword argument 'cache'")
        return whole(model, prompt, answers) + 0.5

    monkeypatch.setattr(likelihood, "shared", broken)
    chooser = Chooser()
    with caplog.at_level("INFO", logger="mmft"):
        found = chooser.options(model, collator, given)
    assert chooser.shares is False and [r.message for r in caplog.records if "whole prompt" in r.message]
    for options, wanted in zip(found, expected, strict=True):
        assert {t: o.likelihood for t, o in options.items()} == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_rows_without_a_picture_after_rows_with_one(small):
    """Qwen2-VL keeps the position offset of the last picture; a text alone must not get it."""
    model, collator, _ = small.load("qwen2vl", dtype="fp32", device="cpu")
    text = replace(small.sample("t", [], "What is this?", "a"), choices=CHOICES)
    given = [*rows(small), text, small.sample("u", [0], "Again?", "a")]
    given[-1] = replace(given[-1], choices=CHOICES)
    for row, options in zip(given, Chooser().options(model, collator, given), strict=True):
        for choice, option in options.items():
            assert option.likelihood == pytest.approx(plain_likelihood(model, collator, row, choice)[0], rel=1e-5, abs=1e-5)


def test_a_choice_is_scored_behind_the_earlier_turns_of_its_row(small):
    model, collator, _ = small.load("llava", dtype="fp32", device="cpu")
    row = replace(small.sample("c", [0], "What is this?", "two dogs", "Which colours?", "red"), choices=("red", "blue"))
    [options] = Chooser().options(model, collator, [row])
    silent = replace(row, messages=[m if m["role"] == "user" else {**m, "loss": False} for m in row.messages])
    for text, option in options.items():
        expected, count = plain_likelihood(model, collator, silent, text)
        assert option.likelihood == pytest.approx(expected, rel=1e-5) and option.tokens == count


def test_calibration_error_equals_numpy_on_random_answers():
    import numpy as np

    rng = np.random.default_rng(0)
    confidence, right = rng.uniform(0.5, 1, 400), rng.uniform(0, 1, 400) < 0.7
    confidence[:3] = 1.0, 0.6, 0.5
    answers = [
        {"id": str(n), "prediction": "a", "references": ["a" if ok else "b"], "probabilities": {"a": float(c), "b": 1 - float(c)}}
        for n, (c, ok) in enumerate(zip(confidence, right, strict=True))
    ]
    for bins in (10, 15):
        edges = np.linspace(0, 1, bins + 1)
        number = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)
        expected = sum((number == b).mean() * abs(right[number == b].mean() - confidence[number == b].mean()) for b in range(bins) if (number == b).any())
        assert Calibration(bins).corpus(answers, [{}] * 400)["ece"] == pytest.approx(expected, abs=1e-12)
    by_hand = [{"prediction": "a", "references": [r], "probabilities": {"a": p, "b": 1 - p}} for p, r in ((0.9, "a"), (0.92, "b"), (0.55, "a"))]
    assert Calibration(10).corpus(by_hand, [{}] * 3)["ece"] == pytest.approx((1 * abs(1 - 0.9) + 1 * abs(0 - 0.92) + 1 * abs(1 - 0.55)) / 3)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["glm5_next", "nemotron_h_omni", "inkling_mm_model", "kimi_k25"])
def test_types_with_other_caches_give_the_numbers_of_whole_sequences(small, tmp_path, kind):
    """Linear attention, state spaces, convolutions: shared where the type's layers can continue, whole where not, the same numbers."""
    from model_types import TYPES, load

    TYPES[kind].build(tmp_path / "model")
    model, collator, _ = load(TYPES[kind], tmp_path / "model")
    given, apart = rows(small)[:3], Chooser(batch_size=8)
    apart.shares = False
    found, expected = (chooser.options(model, collator, given) for chooser in (Chooser(batch_size=8), apart))
    for options, wanted in zip(found, expected, strict=True):
        assert {t: o.likelihood for t, o in options.items()} == pytest.approx({t: o.likelihood for t, o in wanted.items()}, rel=1e-5, abs=1e-5)
