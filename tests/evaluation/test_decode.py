"""Decoding in a batch that rows leave and enter: the answers of transformers one by one, for every family; what takes transformers' own loop."""

import gc
import logging

import pytest
import torch
from small_models import KINDS, MORE

from mmft.evaluation.evaluate import Evaluator

TEXTS = ["Which?", "Describe this image in a few words.", "What is in the picture? Which colours do you see? " * 3]
LIMIT = 12
SHORT = ("qwen2vl", "gemma3", "blip2", "blip2_t5")  # the default suite; the other families are asked in the long one


def rows(small, kind, n=14):
    """Prompts of different lengths, with one image or, where the family takes several, two."""
    several = kind not in ("blip2", *MORE)
    return [small.sample(f"r{i}", [i % 3, (i + 1) % 3][: 1 + (several and i % 4 == 0)], TEXTS[i % 3] + " dogs" * (i % 5), "a red square") for i in range(n)]


def many_ends(collator, model):
    """A random model ends no answer: let every fifth token be an end token, so that answers have all lengths up to the limit."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    collator.end_token_ids = list(range(3, vocabulary, 5))
    return collator


def one_by_one(model, collator, samples, **keys):
    """[(text, truncated)] of transformers' generate for one row at a time."""
    found = []
    for sample in samples:
        inputs = collator.prompt([sample])
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=LIMIT, eos_token_id=collator.end_ids, pad_token_id=collator.tokenizer.pad_token_id, **keys)
        decoder_only = not model.config.is_encoder_decoder and not getattr(model.config.text_config, "is_encoder_decoder", False)
        ids = ids[:, inputs["input_ids"].shape[1] if decoder_only else 1 :]
        ended = bool(torch.isin(ids, torch.tensor(collator.end_ids)).any())
        found.append((collator.decode(ids)[0], not ended))
    return found


@pytest.mark.parametrize("kind", [k if k in SHORT else pytest.param(k, marks=pytest.mark.long) for k in (*KINDS, *MORE)])
def test_answers_are_those_of_one_by_one(small, kind, caplog):
    model, collator, _ = small.load(kind)
    collator = many_ends(small.collator(kind, max_length=None), model)
    samples = rows(small, kind)
    wanted = one_by_one(model, collator, samples)
    assert len({text for text, _ in wanted}) > 4 and 0 < sum(truncated for _, truncated in wanted) < len(wanted)
    for size in (1, 3, 8, 64):
        evaluator = Evaluator(samples, collator, {"max_new_tokens": LIMIT, "do_sample": False}, size)
        with caplog.at_level(logging.INFO, "mmft"):
            assert [(a.text, a.truncated) for a in evaluator.generate(model)] == wanted, size
    assert ("encoder-decoder" in caplog.text) == kind.endswith("t5") == ("own loop" in caplog.text)


def test_a_penalty_for_repeated_tokens_counts_no_padding(small):
    model, collator, _ = small.load("qwen2vl")
    collator = many_ends(small.collator("qwen2vl", max_length=None), model)
    samples = rows(small, "qwen2vl")
    wanted = one_by_one(model, collator, samples, repetition_penalty=1.6)
    got = Evaluator(samples, collator, {"max_new_tokens": LIMIT, "do_sample": False, "repetition_penalty": 1.6}, 8).generate(model)
    assert [(a.text, a.truncated) for a in got] == wanted != one_by_one(model, collator, samples)


@pytest.mark.parametrize(
    "keys, reason",
    [
        ({"num_beams": 2}, "beam search"),
        ({"do_sample": True, "top_k": 5}, "sample"),
        ({"no_repeat_ngram_size": 2}, "NoRepeatNGramLogitsProcessor"),
        ({"max_time": 60.0}, "MaxTimeCriteria"),
        ({"cache_implementation": "static"}, "cache_implementation=static"),
    ],
)
def test_other_settings_take_transformers_own_loop_and_say_so(small, caplog, keys, reason):
    model, collator, _ = small.load("qwen2vl")
    samples = rows(small, "qwen2vl", 5)
    evaluator = Evaluator(samples, collator, {"max_new_tokens": 4, "do_sample": False, **keys}, 2)
    with caplog.at_level(logging.INFO, "mmft"):
        torch.manual_seed(0)
        got = [a.text for a in evaluator.generate(model)]
    assert f"batches of 2 in transformers' own loop: {reason}" in caplog.text
    if "do_sample" in keys:  # what is drawn depends on the batches: the rows in their order
        torch.manual_seed(0)
        wanted = [a.text for start in (0, 2, 4) for a in evaluator.answer(model, collator.prompt(samples[start : start + 2]))]
    else:
        wanted = [evaluator.answer(model, collator.prompt([sample]))[0].text for sample in samples]
    assert got == wanted


@pytest.mark.long
def test_rows_that_are_answered_leave_no_tensors(small):
    """The number of tensors while rows are answered does not grow with the rows that are done."""
    model, collator, _ = small.load("qwen2vl")
    collator = many_ends(small.collator("qwen2vl", max_length=None), model)
    evaluator = Evaluator([], collator, {"max_new_tokens": LIMIT, "do_sample": False}, 8)
    counts = []
    for n, _ in enumerate(evaluator.answers(model, rows(small, "qwen2vl", 120))):
        if n % 20 == 19:
            gc.collect()
            counts.append(sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()))
    assert max(counts[2:]) <= counts[1] * 1.05


@pytest.mark.parametrize("kind, reason", [("exaone4_5", "counts positions by its cache"), ("qwen3_5", "keeps more than keys and values of its tokens")])
def test_models_whose_rows_cannot_move_in_the_batch_take_transformers_own_loop(kind, reason, tmp_path, caplog):
    from model_types import TYPES, load

    from mmft.conformance.subject import Subject

    TYPES[kind].build(tmp_path / "model")
    subject = Subject.create(*load(TYPES[kind], tmp_path / "model"), tmp_path / "images")
    model, collator = subject.model, many_ends(subject.collator, subject.model)
    samples = [subject.row(f"r{i}", (i % 3,), TEXTS[i % 3] + " dogs" * i, "a red square") for i in range(6)]
    wanted = one_by_one(model, collator, samples)
    with caplog.at_level(logging.INFO, "mmft"):
        got = Evaluator(samples, collator, {"max_new_tokens": LIMIT, "do_sample": False}, 3).generate(model)
    assert [(a.text, a.truncated) for a in got] == wanted and len(set(wanted)) > 2
    assert reason in caplog.text
