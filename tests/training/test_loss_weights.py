"""Loss weights of messages, rows and sources: where they are read, which tokens they reach, and what a step does with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mixed import mix, write_sources
from safetensors.torch import load_file

from mmft.collators.base import IGNORE
from mmft.data.sample import BadRow
from mmft.data.sources.columns import Columns
from mmft.data.sources.turns import record_row

STEP = ["trainer.optim=sgd", "trainer.lr_scheduler_type=constant", "trainer.warmup_steps=0", "trainer.max_steps=1", "trainer.max_grad_norm=0", "lora.lora_dropout=0",
        "trainer.logging_steps=1", "evaluation.split=null", "logger=none", "audit=false", "trainer.per_device_train_batch_size=16"]  # fmt: skip


def turn(role: str, text: str, **more: object) -> dict:
    return {"role": role, "content": text, **more}


def weights_of(values: dict) -> list[object]:
    row = record_row(values, values["messages"], "x", "kept", "xyxy")
    assert not isinstance(row, BadRow), row
    return [False if m.get("loss") is False else m.get("weight", 1) for m in row.messages if m["role"] == "assistant"]


def test_weights_of_messages_and_rows_multiply():
    talk = [turn("user", "a"), turn("assistant", "b", weight=0.3), turn("user", "c"), turn("assistant", "d")]
    assert weights_of({"messages": talk}) == [0.3, 1]
    assert weights_of({"messages": talk, "weight": "0.5"}) == [0.15, 0.5]
    assert weights_of({"messages": [turn("user", "a"), turn("assistant", "b", weight=0), turn("user", "c"), turn("assistant", "d", weight=1)]}) == [False, 1]
    row = Columns(weight="w").row({"image": "1.png", "text": "x", "w": 2}, "x")
    assert not isinstance(row, BadRow) and row.messages[-1]["weight"] == 2 and "weight" not in row.messages[0]


@pytest.mark.parametrize(("values", "reason"), [
    ({"messages": [turn("user", "a"), turn("assistant", "b", weight="much")]}, "broken weight: turn 2 has weight=much"),
    ({"messages": [turn("user", "a"), turn("assistant", "b", weight=-1)]}, "it must be a number, 0 or above"),
    ({"messages": [turn("user", "a"), turn("assistant", "b")], "weight": float("nan")}, "broken weight: the row has weight=nan"),
    ({"messages": [turn("user", "a"), turn("assistant", "b")], "weight": 0}, "no weight"),
])  # fmt: skip
def test_a_weight_that_is_none_is_a_bad_row(values, reason):
    row = record_row(values, values["messages"], "x", "kept", "xyxy")
    assert isinstance(row, BadRow) and reason in row.reason


def runs(labels: torch.Tensor, weights: torch.Tensor) -> list[set[float]]:
    """The weights of each run of tokens with loss, in order."""
    found: list[set[float]] = []
    for i, label in enumerate(labels.tolist()):
        if label == IGNORE:
            assert weights[i] == 0
            continue
        if i == 0 or labels[i - 1] == IGNORE:
            found.append(set())
        found[-1].add(round(float(weights[i]), 5))
    return found


@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2"])
def test_every_token_of_an_answer_has_its_weight(small, kind):
    import dataclasses

    from mmft.feature_cache.cache import packed, unpacked

    _, collator, _ = small.load(kind)
    several = kind != "blip2"
    plain = small.sample("a", [0], "What?", "a red square", *(("And?", "birds") if several else ()))
    weighed = dataclasses.replace(plain, messages=[dict(m) for m in plain.messages])
    answers = [m for m in weighed.messages if m["role"] == "assistant"]
    answers[0]["weight"] = 0.25
    assert "loss_weights" not in collator([plain])
    batch = collator([weighed, plain, dataclasses.replace(weighed, weight=2.0)])
    found = [runs(*pair) for pair in zip(batch["labels"], batch["loss_weights"])]
    assert found == ([[{0.25}, {1.0}], [{1.0}, {1.0}], [{0.5}, {2.0}]] if several else [[{0.25}], [{1.0}], [{0.5}]])
    [row], _ = collator.encode_checked([weighed], False)
    [kept] = unpacked(packed(row))
    assert list(kept.weights) == list(row[0].weights)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sources(tmp_path_factory.mktemp("weights"))


def step(folder: Path, name: str, *words: str) -> Path:
    from mmft.cli.main import main

    assert main([*words, *STEP, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={(folder / name).as_posix()}"]) == 0
    return folder / name


def moved(run: Path) -> dict[str, torch.Tensor]:
    return {name: value for name, value in load_file(run / "adapter" / "adapter_model.safetensors").items() if ".lora_B." in name}


def first_loss(run: Path) -> float:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]


def test_half_the_weight_is_half_the_step_and_half_the_loss(folder):
    """A table with a column of weights, through the cache of features as a run uses it."""
    lines = (folder / "caps.csv").read_text(encoding="utf-8").splitlines()
    (folder / "half.csv").write_text("\n".join([lines[0] + ",w", *(f"{line},0.5" for line in lines[1:])]), encoding="utf-8")
    table = ["data=table", "data.columns.image=image", "data.columns.text=answer", "data.columns.prompt=question", "data.columns.split=split"]
    whole = step(folder, "whole", *table, f"data.path={(folder / 'caps.csv').as_posix()}", "trainer.learning_rate=0.1")
    half = step(folder, "half", *table, f"data.path={(folder / 'half.csv').as_posix()}", "data.columns.weight=w", "trainer.learning_rate=0.2")
    assert first_loss(half) == pytest.approx(first_loss(whole) / 2, rel=1e-5)
    assert any(value.abs().max() > 1e-4 for value in moved(whole).values())
    assert all(torch.allclose(value, moved(whole)[name], rtol=1e-3, atol=1e-7) for name, value in moved(half).items())


def test_a_source_weighs_against_the_others(folder, mmft):
    """The step is linear in the weight of one source: W(1.5) - W(1) = W(1) - W(0.5), and the losses by source are weighted ones."""
    words = [*mix(folder, "caps", "chat"), "trainer.learning_rate=0.1"]
    low, one, high = (step(folder, f"chat{w}", *words, f"data.sources.chat.loss_weight={w}") for w in (0.5, 1, 1.5))
    a, b, c = moved(low), moved(one), moved(high)
    assert all(torch.allclose(c[name] - b[name], b[name] - a[name], atol=2e-6) for name in a)
    assert any((c[name] - b[name]).abs().max() > 1e-4 for name in a)
    logged = [json.loads((run / "metrics.jsonl").read_text().splitlines()[0]) for run in (low, one)]
    assert logged[0]["loss/chat"] == pytest.approx(logged[1]["loss/chat"] / 2, rel=1e-4) and logged[0]["loss/caps"] == pytest.approx(logged[1]["loss/caps"], rel=1e-5)
    for refused, expected in ((["data.sources.chat.loss_weight=0"], "must be a number above 0"), (["data.sources.chat.loss_weight=big"], "loss_weight=big")):
        code, _, err = mmft(*words, *refused)
        assert code == 2 and expected in err and err.count("\n") == 1
    code, _, err = mmft("data.loss_weight=0.5")
    assert code == 2 and "data.sources.NAME.loss_weight=0.5" in err and err.count("\n") == 1


def test_the_audit_shows_the_weights(folder, mmft, tmp_path):
    talk = [turn("user", "Say one."), turn("assistant", "one", weight=0.3), turn("user", "Say two."), turn("assistant", "two")]
    (tmp_path / "talk.jsonl").write_text(json.dumps({"messages": talk}) + "\n", encoding="utf-8")
    page = tmp_path / "page.html"
    code, out, err = mmft("audit", "data=messages", f"data.path={(tmp_path / 'talk.jsonl').as_posix()}", "data.text_only=true", "data.splits.validation=0",
                          "generate=0", "estimate=false", f"out={page.as_posix()}")  # fmt: skip
    assert "[[x0.3 one" in out and "[[two" in out and "loss weights: 0.3: " in out, (out, err)
    assert "some of it weighted x0.3" in page.read_text(encoding="utf-8") and "Loss weights: 0.3: " in page.read_text(encoding="utf-8")
