"""Resume after the last step, at the end of an epoch, after early stopping, and with a best checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from interrupted import SMALL, final, harm, killed_after, rows

EPOCHS = [w for w in SMALL if "max_steps" not in w] + ["trainer.num_train_epochs=2", "trainer.eval_strategy=epoch", "trainer.logging_strategy=epoch"]


def trained(folder: Path, *words: str) -> Path:
    from mmft.cli.main import main

    assert main([*words, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={(folder / 'run').as_posix()}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def epochs(tmp_path_factory):
    """Two epochs of five steps, each measured at its end and saved at every step."""
    return trained(tmp_path_factory.mktemp("epochs"), *EPOCHS)


def assert_ends_alike(mmft, run: Path, whole: Path) -> str:
    code, out, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0, err[-2000:]
    assert final(run) == final(whole) and rows(run) == rows(whole)
    one, other = (json.loads((r / "summary.json").read_text(encoding="utf-8")) for r in (whole, run))
    assert all(one[k] == other[k] for k in ("steps", "supervised_tokens", "eval_loss", "train_loss", "skipped_steps"))
    assert other["times"]["train"] >= json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["train_runtime"] - 0.01, "all parts count"
    return out


@pytest.mark.parametrize("step", [5, 10])
def test_evaluation_and_log_at_the_end_of_an_epoch_are_done_after_a_kill_before_them(mmft, tmp_path, epochs, step):
    """The kill comes right after the checkpoint of the epoch's last step."""
    run = killed_after(epochs, step, tmp_path / "run")
    assert f"from step {step}" in assert_ends_alike(mmft, run, epochs)


def test_no_step_is_trained_after_the_last(mmft, tmp_path):
    """Four steps of an epoch of five; the kill comes while the result is measured."""
    words = [w if "max_steps" not in w else "trainer.max_steps=4" for w in SMALL]
    whole = trained(tmp_path / "whole", *words)
    run = killed_after(whole, 4, tmp_path / "run")
    assert_ends_alike(mmft, run, whole)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4


EARLY = [
    *(w for w in SMALL if "max_steps" not in w and "logging_steps" not in w and "save_total" not in w), "trainer.max_steps=12", "trainer.logging_steps=1",
    "trainer.eval_strategy=steps", "trainer.eval_steps=1", "trainer.load_best_model_at_end=true", "trainer.metric_for_best_model=eval_loss",
    "trainer.early_stopping_patience=2", "trainer.learning_rate=0.5", "trainer.warmup_steps=0", "trainer.save_total_limit=20",
]  # fmt: skip


@pytest.mark.long
def test_early_stopping_and_the_best_checkpoint_survive_a_kill(mmft, tmp_path):
    whole = trained(tmp_path / "whole", *EARLY)
    steps = json.loads((whole / "summary.json").read_text())["steps"]
    state = json.loads((whole / "checkpoints" / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    best = state["best_global_step"]
    assert steps == best + 2 < 12, "two measurements without improvement end it"
    for step in {steps, steps - 1}:  # with the patience used up, and one step before; the copy has moved, and its best checkpoint with it
        assert_ends_alike(mmft, killed_after(whole, step, tmp_path / f"at{step}"), whole)
    run = killed_after(whole, steps, tmp_path / "damaged")
    harm(run / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors", "flipped")
    out = assert_ends_alike(mmft, run, whole)
    assert f"the best checkpoint it refers to, checkpoint-{best}, is damaged" in out


def test_a_stop_in_an_epoch_does_not_evaluate_or_log_its_end(mmft, tmp_path, epochs, monkeypatch):
    from mmft.training.callbacks import StopOnSignal

    on_step_end = StopOnSignal.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", stop)
    run = tmp_path / "run"
    code, _, err = mmft(*EPOCHS, "trainer.save_strategy=no", f"run_dir={run.as_posix()}")
    assert code == 75 and "stopped after step 3" in err, err
    assert not any("eval_loss" in r for r in rows(run)) and json.loads((run / "summary.json").read_text())["status"] == "preempted"
    monkeypatch.undo()
    code, out, err = mmft(*EPOCHS, "trainer.save_strategy=no", f"run_dir={run.as_posix()}")  # the same command
    assert code == 0 and "from step 3" in out, err
    assert final(run) == final(epochs) and rows(run) == rows(epochs)


def test_a_skipped_step_does_not_count_in_the_mean_loss(mmft, tmp_path, monkeypatch):
    from mmft.training import trainer

    loss, calls = trainer.grouped_loss, []

    def spoiled(*args):
        calls.append(1)
        value, *counts = loss(*args)
        return (value * float("nan"), *counts) if len(calls) == 2 else (value, *counts)

    monkeypatch.setattr(trainer, "grouped_loss", spoiled)
    run = tmp_path / "run"
    code, _, err = mmft(*SMALL, "trainer.nonfinite=skip", "trainer.logging_first_step=true", f"run_dir={run.as_posix()}")
    assert code == 0, err
    first = [r for r in rows(run) if "loss" in r]
    assert [r["step"] for r in first] == [1, 4, 6], "step 2 has no loss; all others have one"
    assert any("train_loss" in r for r in rows(run)), "the mean over the run is a number"


def test_a_file_that_is_not_in_the_manifest_is_a_fault(tmp_path):
    from mmft.training import checkpoints

    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "a").write_text("x")
    checkpoints.seal(folder)
    assert checkpoints.problem(folder) is None
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin is not in manifest.json" in checkpoints.problem(folder)


@pytest.mark.parametrize("new_in_place", [False, True])
def test_saving_a_step_again_always_leaves_one_checkpoint(tmp_path, new_in_place):
    """After a kill between the two renames the old one is put back; after both it is removed."""
    from mmft.training import checkpoints

    names = (".replaced-3", "checkpoint-3") if new_in_place else (".replaced-3",)
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text(name)
        (tmp_path / name / checkpoints.STATE).write_text(json.dumps({"format": checkpoints.FORMAT}))
        checkpoints.seal(tmp_path / name)
    found = checkpoints.newest(tmp_path)
    assert found == tmp_path / "checkpoint-3" and (found / "a").read_text() == names[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    shutil.rmtree(found)


def test_a_checkpoint_of_another_version_is_moved_aside(tmp_path):
    """It verifies, but its state has another format, or none: the run goes on from an earlier checkpoint."""
    from mmft.training import checkpoints

    for step, state in ((1, {"format": checkpoints.FORMAT}), (2, {"format": checkpoints.FORMAT - 1}), (3, {})):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / checkpoints.STATE).write_text(json.dumps(state))
        checkpoints.seal(folder)
        assert checkpoints.problem(folder) is None
    assert checkpoints.newest(tmp_path).name == "checkpoint-1"
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["checkpoint-2", "checkpoint-3"]
