"""Micro-batches merged into one batch: the same losses and weights, also with dropout; not merged if switched off or without memory."""

from __future__ import annotations

import json

import pytest
from PIL import Image
from safetensors.torch import load_file

SHAPES = ["data.pictures=17", "data.splits.validation=2"]
SMALL = ["trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.num_train_epochs=2",
         "trainer.gradient_accumulation_steps=3", "lora.lora_dropout=0.3", "trainer.fold_accumulation=always", "evaluation.split=null", "logger=none"]  # fmt: skip


def train(mmft, folder, *words, data=SHAPES):
    code, out, err = mmft(*data, *SMALL, *words, f"run_dir={folder.as_posix()}")
    assert code == 0, err[-2000:]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors"), json.loads((folder / "summary.json").read_text(encoding="utf-8")), out


@pytest.mark.long
def test_a_merged_step_equals_the_accumulated_one(mmft, tmp_path):
    """15 rows, 2 x 3 a step: the last step of an epoch is a shorter one. Dropout masks are those of the micro-batches."""
    losses, weights, summary, out = train(mmft, tmp_path / "merged")
    assert "the 3 micro-batches of a step are computed as one" in out and summary["micro_batches_folded"] == 3
    plain, reference, other, out = train(mmft, tmp_path / "plain", "trainer.fold_accumulation=off")
    assert "computed as one" not in out and other["micro_batches_folded"] == 1
    assert len(losses) == 6 and losses == pytest.approx(plain, abs=1e-5)
    assert max(float((weights[k] - reference[k]).abs().max()) for k in weights) < 1e-4 < max(float(w.abs().max()) for w in weights.values())
    assert (summary["effective_batch_size"], summary["steps"], summary["supervised_tokens"]) == (6, 6, other["supervised_tokens"])


def test_without_enough_memory_micro_batches_are_not_merged(mmft, tmp_path, monkeypatch):
    from mmft.system import memory

    monkeypatch.setattr(memory, "free_memory", lambda device, sharers=1: 1000)
    *_, summary, _ = train(mmft, tmp_path / "tight", "trainer.max_steps=1")
    assert summary["micro_batches_folded"] == 1


def test_auto_on_a_cpu_merges_only_rows_of_one_length(mmft, tmp_path):
    """If every fourth answer is long, a merged batch would be mostly padding."""
    Image.new("RGB", (56, 56), (200, 40, 0)).save(tmp_path / "a.png")
    for name, answers in {"even": ["a red square"] * 16, "uneven": ["red", "red", "red", "a red square " * 12] * 4}.items():
        rows = tmp_path / f"{name}.csv"
        rows.write_text("\n".join(["image,question,answer", *(f"a.png,What is it {n}?,{a}" for n, a in enumerate(answers))]), encoding="utf-8")
        words = ["data=table", f"data.path={rows.as_posix()}", "data.columns={image: image, text: answer, prompt: question}", "data.splits.validation=0", f"output_dir={(tmp_path / 'o').as_posix()}"]
        words += ["trainer.fold_accumulation=auto", "trainer.max_steps=1", "trainer.per_device_train_batch_size=1"]
        *_, summary, _ = train(mmft, tmp_path / name, *words, data=())
        assert summary["micro_batches_folded"] == {"even": 3, "uneven": 1}[name]


@pytest.mark.long
def test_jointly_trained_points_are_not_merged_on_a_cpu(mmft, tmp_path):
    words = [*SHAPES, *SMALL, "trainer.fold_accumulation=auto", "trainer.max_steps=1", "name=two"]
    code, _, err = mmft("-m", "lora.r=2,4", *words, f"output_dir={tmp_path.as_posix()}", output_dir=False)
    assert code == 0, err[-2000:]
    summaries = [json.loads(file.read_text(encoding="utf-8")) for file in tmp_path.glob("sweeps/two/*/summary.json")]
    assert [(s["trained_together"], s["micro_batches_folded"]) for s in summaries] == [(2, 1)] * 2


def test_settings_that_forbid_merging():
    from mmft.training.accumulation import mergeable

    counts = [mergeable({"gradient_accumulation_steps": 4, **more}) for more in ({}, {"fold_accumulation": "off"}, {"fsdp": "full_shard"})]
    assert counts == [4, 1, 1]


def test_a_wrong_value_is_one_line(mmft):
    code, _, err = mmft(*SHAPES, *SMALL, "trainer.fold_accumulation=yes")
    assert code == 2 and err.splitlines()[-1] == "mmft: trainer.fold_accumulation=yes: must be auto, always or off" and "Traceback" not in err
