"""The micro-batches of a step computed as one: the same losses and weights, also under dropout; off when asked, and when memory lacks."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

SMALL = ["data.pictures=17", "data.splits.validation=2", "trainer.logging_steps=1", "trainer.per_device_train_batch_size=2", "trainer.num_train_epochs=2",
         "trainer.gradient_accumulation_steps=3", "lora.lora_dropout=0.3", "trainer.fold_accumulation=always", "evaluation.split=null", "logger=none"]  # fmt: skip


def trained(mmft, folder, *words):
    code, out, err = mmft(*SMALL, *words, f"run_dir={folder.as_posix()}")
    assert code == 0, err[-2000:]
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines() if '"loss"' in line]
    return losses, load_file(folder / "adapter" / "adapter_model.safetensors"), json.loads((folder / "summary.json").read_text(encoding="utf-8")), out


def test_a_folded_step_equals_the_accumulated_one(mmft, tmp_path, monkeypatch):
    """15 rows, 2 x 3 a step: the last step of an epoch is a shorter one. Dropout masks are those of the micro-batches."""
    losses, weights, summary, out = trained(mmft, tmp_path / "folded")
    assert "the 3 micro-batches of a step are computed as one" in out and summary["micro_batches_folded"] == 3
    plain, reference, other, out = trained(mmft, tmp_path / "plain", "trainer.fold_accumulation=off")
    assert "computed as one" not in out and other["micro_batches_folded"] == 1
    assert len(losses) == 6 and losses == pytest.approx(plain, abs=1e-5)
    assert max(float((weights[k] - reference[k]).abs().max()) for k in weights) < 1e-4 < max(float(w.abs().max()) for w in weights.values())
    assert (summary["effective_batch_size"], summary["steps"], summary["supervised_tokens"]) == (6, 6, other["supervised_tokens"])


def test_without_memory_for_it_micro_batches_stay(mmft, tmp_path, monkeypatch):
    from mmft import folding

    monkeypatch.setattr(folding, "free_memory", lambda device: 1000)
    *_, summary, _ = trained(mmft, tmp_path / "tight", "trainer.max_steps=1")
    assert summary["micro_batches_folded"] == 1


def test_auto_folds_on_gpus_alone(monkeypatch):
    from mmft.folding import foldable

    assert [foldable({"gradient_accumulation_steps": 4}, device) for device in ("cpu", "cuda")] == [1, 4]
    assert foldable({"gradient_accumulation_steps": 4, "fold_accumulation": "always"}, "cpu") == 4


def test_a_wrong_value_is_one_line(mmft):
    code, _, err = mmft(*SMALL, "trainer.fold_accumulation=yes")
    assert code == 2 and "trainer.fold_accumulation" in err and err.count("\n") == 1
