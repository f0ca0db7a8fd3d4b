"""The average of the weights: its formula over the saved checkpoints, exact resume, joint runs, and what it does not go with."""

from __future__ import annotations

import json

import pytest
import torch
from interrupted import SMALL, final, killed_after
from safetensors.torch import load_file

WORDS = [*SMALL, "trainer.max_steps=4", "trainer.ema_decay=0.5", "trainer.learning_rate=0.02", "lora.r=2", "evaluation.split=null"]


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    from mmft.cli.main import main

    folder = tmp_path_factory.mktemp("ema")
    still = ["trainer.learning_rate=0", "trainer.max_steps=1", "trainer.ema_decay=null"]
    assert main([*(w for w in WORDS if w.partition("=")[0] not in {s.partition("=")[0] for s in still}), *still, f"output_dir={folder.as_posix()}", f"run_dir={(folder / 'begun').as_posix()}"]) == 0
    assert main([*WORDS, f"output_dir={folder.as_posix()}", f"run_dir={(folder / 'run').as_posix()}"]) == 0
    return folder


def test_the_run_ends_with_the_average_of_its_steps(averaged):
    steps = [load_file(averaged / "run" / "checkpoints" / f"checkpoint-{n}" / "adapter_model.safetensors") for n in range(1, 5)]
    expected = {name: value.double() for name, value in load_file(averaged / "begun" / "adapter" / "adapter_model.safetensors").items()}
    for n, weights in enumerate(steps, 1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = {name: decay * value + (1 - decay) * weights[name].double() for name, value in expected.items()}
    saved = load_file(averaged / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(value.double(), expected[name], atol=1e-6) for name, value in saved.items())
    assert any((value - steps[-1][name]).abs().max() > 1e-3 for name, value in saved.items()), "it is not the last step"
    assert "average of its weights" in json.loads((averaged / "run" / "lora_plan.json").read_text())["notes"][0]


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_average_ends_with_the_same_bytes(mmft, tmp_path, averaged, step):
    run = killed_after(averaged / "run", step, tmp_path / "run")
    code, _, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and final(run) == final(averaged / "run"), err


def test_averages_train_jointly_as_they_do_alone(mmft, averaged):
    place = f"output_dir={averaged.as_posix()}"
    words = [word for word in WORDS if not word.startswith("trainer.ema_decay")]
    code, out, err = mmft("-m", *words, "trainer.ema_decay=0.5,0.1", "name=swept", "hydra.launcher.processes=1", place, output_dir=False)
    assert code == 0 and "2 points in step" in out, err
    joint = load_file(averaged / "sweeps" / "swept" / "trainer.ema_decay-0.5" / "adapter" / "adapter_model.safetensors")
    alone = load_file(averaged / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.allclose(value, alone[name], rtol=1e-3, atol=1e-4) for name, value in joint.items())


@pytest.mark.parametrize(("words", "expected"), [
    (["trainer.ema_decay=1.5"], "between 0 and 1"),
    (["trainer.ema_decay=0.9", "trainer.load_best_model_at_end=true", "trainer.save_strategy=steps", "trainer.eval_strategy=steps"], "drop one of them"),
])  # fmt: skip
def test_what_an_average_does_not_go_with_is_refused(mmft, words, expected):
    code, _, err = mmft("data.pictures=22", "data.splits.validation=2", *words)
    assert code == 2 and expected in err and err.count("\n") == 1, err
