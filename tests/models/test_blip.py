"""BLIP-2 with Flan-T5 and InstructBLIP: the answer goes to the decoder, the question to encoder and Q-Former. Against transformers alone."""

from __future__ import annotations

import json

import pytest
import torch
from small_models import MORE

from mmft.losses.supervised import supervised_logits, supervised_loss

KINDS = list(MORE)
ROWS = [([0], "What is this?", "a red square"), ([1], "Which colours do you see?", "two dogs and 12 birds"), ([2], "Answer:", "blue")]


def samples(small):
    return [small.sample(str(i), images, question, answer) for i, (images, question, answer) in enumerate(ROWS)]


def by_transformers(small, kind: str, i: int):
    """(processor's inputs for the question, ids of the answer): the processor's own call, and the tokenizer's for the answer."""
    from PIL import Image
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(small(kind))
    images, question, answer = ROWS[i]
    inputs = processor(images=Image.open(small.root / f"{images[0]}.png").convert("RGB"), text=question, return_tensors="pt")
    if kind.endswith("_t5"):
        return inputs, processor.tokenizer(answer, return_tensors="pt")["input_ids"]
    whole = processor.tokenizer(f"{question} {answer}")["input_ids"]
    answer_ids = whole[len(processor.tokenizer(question)["input_ids"]) :]
    return inputs, torch.tensor([[*answer_ids, 2]])


def plain(small, kind: str):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(small(kind)).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_that_of_transformers_and_its_processor(small, kind):
    model, collator, _ = small.load(kind)
    stock = plain(small, kind)
    total, count = 0.0, 0
    for i in range(3):
        inputs, answer = by_transformers(small, kind, i)
        with torch.no_grad():
            if kind.endswith("_t5"):
                total += float(stock(**inputs, labels=answer).loss) * answer.numel()
            else:
                ids = torch.cat([inputs.pop("input_ids"), answer], 1)
                inputs.pop("attention_mask")
                logits = stock(**inputs, input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -answer.numel() - 1 : -1]
                total += float(torch.nn.functional.cross_entropy(logits, answer[0], reduction="sum"))
        count += answer.numel()
    with torch.no_grad():
        loss, n = supervised_loss(model, collator(samples(small)))
    assert int(n) == count and float(loss) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_is_the_processors_own_and_begins_the_training_row(small, kind):
    collator = small.collator(kind)
    for i, sample in enumerate(samples(small)):
        inputs, answer = by_transformers(small, kind, i)
        prompt, row = collator.prompt([sample]), collator([sample])
        assert prompt["input_ids"].tolist() == inputs["input_ids"].tolist()
        assert row["input_ids"].tolist() == [inputs["input_ids"][0].tolist() + answer[0].tolist()]
        if kind.startswith("instructblip"):
            assert prompt["qformer_input_ids"].tolist() == row["qformer_input_ids"].tolist() == inputs["qformer_input_ids"].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_together_give_the_logits_of_rows_alone(small, kind):
    model, collator, _ = small.load(kind)
    rows = samples(small)
    with torch.no_grad():
        together, targets, _ = supervised_logits(model, collator(rows))
        alone = [supervised_logits(model, collator([row])) for row in rows]
    assert torch.cat([a[1] for a in alone]).equal(targets)
    assert torch.allclose(torch.cat([a[0] for a in alone]), together, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_together_are_answered_as_rows_alone_by_transformers(small, kind):
    from mmft.evaluation.evaluate import Evaluator

    model, collator, _ = small.load(kind)
    rows = samples(small)
    got = [a.text for a in Evaluator(rows, collator, {"max_new_tokens": 6, "do_sample": False}, 3).generate(model)]
    stock, wanted = plain(small, kind), []
    for i in range(3):
        inputs, _ = by_transformers(small, kind, i)
        ids = stock.generate(**inputs, max_new_tokens=6, do_sample=False)
        start = 1 if kind.endswith("_t5") else inputs["input_ids"].shape[1]
        wanted += collator.decode(ids[:, start:])
    assert got == wanted and any(got)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("instructblip")])
def test_the_questions_of_the_q_former_change_the_image_features(small, kind):
    """So they must not be cached by image: the cache says why it is off."""
    from mmft.feature_cache.image_features import takes_features

    model, collator, _ = small.load(kind)
    batches = [collator([small.sample("a", [0], question, "a red square")]) for question in ("What is this?", "Which colours?")]
    features = [model.get_image_features(b["pixel_values"], qformer_input_ids=b["qformer_input_ids"], return_dict=True).pooler_output for b in batches]
    assert not torch.allclose(*features, atol=1e-4)
    assert not takes_features(model)


def test_a_long_question_is_cut_for_the_q_former_alone(small):
    collator = small.collator("instructblip")
    sample = small.sample("a", [0], "a" * 10 + " b" * 90, "blue")
    batch = collator([sample])
    assert batch["qformer_input_ids"].shape[1] == 64 and batch["input_ids"].shape[1] > 90


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_the_whole_command(small, mmft, tmp_path, kind):
    """Train, evaluate with the base, predict, merge; the adapter and the merged model load in plain libraries."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    (tmp_path / "rows.jsonl").write_text("".join(
        json.dumps({"image": f"{images[0]}.png", "question": q, "answer": a}) + "\n" for _ in range(3) for images, q, a in ROWS), encoding="utf-8")  # fmt: skip
    run = tmp_path / "run"
    words = [f"model={kind.removesuffix('_t5')}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={(tmp_path / 'rows.jsonl').as_posix()}",
             f"data.root={small.root.as_posix()}", "data.columns={image: image, text: answer, prompt: question}", "data.splits.validation=0", "evaluation.split=train",
             "evaluation.max_samples=3", "logger=none", "trainer.max_steps=3", "trainer.per_device_train_batch_size=3", "trainer.learning_rate=0.01",
             "trainer.warmup_steps=0", "generation.max_new_tokens=4", "lora.r=4", f"run_dir={run.as_posix()}"]  # fmt: skip
    code, out, err = mmft(*words)
    assert code == 0, err[-2000:]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval_loss"] < summary["base_eval_loss"], "three steps on the measured rows"
    plan = json.loads((run / "lora_plan.json").read_text(encoding="utf-8"))
    assert {r["part"] for r in plan["rows"] if r["trainable"]} == {"language"}
    for verb in (["evaluate", "base=true", "evaluation.split=train"], ["predict", "input=train"], ["merge", "samples=2"]):
        code, out, err = mmft(*verb, f"run={run.as_posix()}")
        assert code == 0, (verb, err[-1000:])
    inputs, answer = by_transformers(small, kind, 1)
    if not kind.endswith("_t5"):
        inputs["input_ids"] = torch.cat([inputs["input_ids"], answer], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    options = {"decoder_input_ids": answer} if kind.endswith("_t5") else {}
    with torch.no_grad():
        tuned = PeftModel.from_pretrained(plain(small, kind), run / "adapter").eval()(**inputs, **options).logits
        merged = AutoModelForImageTextToText.from_pretrained(run / "merged").eval()(**inputs, **options).logits
        base = plain(small, kind)(**inputs, **options).logits
    assert torch.allclose(tuned, merged, atol=1e-3) and not torch.allclose(tuned, base, atol=1e-2)
