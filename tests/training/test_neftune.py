"""NEFTune adds noise to the embeddings while training, though they are frozen."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

SMALL = ["data.pictures=24", "data.splits.validation=0", "evaluation.split=null", "trainer.max_steps=3", "trainer.per_device_train_batch_size=2", "logger=none"]


def trained(mmft, run, *words):
    code, out, err = mmft(*SMALL, *words, f"run_dir={run.as_posix()}")
    assert code == 0, err[-2000:]
    return load_file(run / "adapter" / "adapter_model.safetensors"), out


@pytest.mark.long
def test_noise_changes_the_adapter_and_a_seed_repeats_it(mmft, tmp_path):
    plain, _ = trained(mmft, tmp_path / "plain")
    noisy, _ = trained(mmft, tmp_path / "noisy", "trainer.neftune_noise_alpha=20")
    again, _ = trained(mmft, tmp_path / "again", "trainer.neftune_noise_alpha=20")
    assert any(not (plain[k] == noisy[k]).all() for k in plain)
    assert all((again[k] == noisy[k]).all() for k in noisy)


@pytest.mark.long
def test_points_of_a_sweep_train_alone_with_it(mmft):
    code, out, err = mmft("-m", "lora.r=2,4", *SMALL, "trainer.neftune_noise_alpha=20", "name=noise")
    assert code == 0 and "neftune_noise_alpha adds noise to the embeddings" in out, err[-2000:]
