"""A full disk is reported before the start and before each save, with the bytes needed; no checkpoint is lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from interrupted import SMALL, final, rows, start, wait_for

from mmft.models.load import load_skeleton, locate_model
from mmft.system.disk import folder_size
from mmft.training.checkpoints import bytes_on_disk

SAVING = [w for w in SMALL if "save_total_limit" not in w and "save_steps" not in w]


def test_the_predicted_bytes_are_those_written(mmft, tmp_path):
    from mmft.adapters.plan import plan_adapter
    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.config.plain import to_plain
    from mmft.training import disk_space

    words = [*SAVING, "trainer.save_steps=1", "trainer.save_total_limit=2"]
    run = tmp_path / "run"
    assert mmft(*words, f"run_dir={run.as_posix()}")[0] == 0
    cfg = compose(words)
    family, settings = build(cfg.model, "model"), to_plain(cfg)
    located = locate_model(family)
    skeleton = load_skeleton(family, located)
    need = disk_space.disk_need(skeleton, plan_adapter(skeleton, settings["lora"]), settings, located.folder, 20, 2).parts
    each = folder_size(run / "checkpoints" / "checkpoint-6")
    assert need["3 checkpoints with optimizer state"] == pytest.approx(3 * each, rel=0.1) and need["3 checkpoints with optimizer state"] >= 3 * each
    assert need["adapter"] == pytest.approx(folder_size(run / "adapter"), rel=0.1)
    rest = folder_size(run) - folder_size(run / "checkpoints") - folder_size(run / "adapter")
    assert rest < need["answers and report"]


@pytest.mark.parametrize("more, n", [
    ({}, 1), ({"save_strategy": "epoch"}, 4), ({"save_strategy": "epoch", "save_total_limit": 1}, 2), ({"save_strategy": "steps", "save_steps": 10}, 8),
    ({"save_strategy": "steps", "save_steps": 0.5}, 3), ({"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True}, 3),
    ({"save_strategy": "steps", "save_steps": 5, "max_steps": 7}, 2),
])  # fmt: skip
def test_the_largest_number_of_checkpoints_at_once(more, n):
    from mmft.training.disk_space import checkpoint_count

    assert checkpoint_count({"per_device_train_batch_size": 4, "num_train_epochs": 3, "save_strategy": "no", **more}, 100) == n


def test_full_training_saves_all_parameters(mmft):
    from mmft.adapters.plan import plan_adapter
    from mmft.config.build import build
    from mmft.config.compose import compose
    from mmft.training import disk_space

    skeleton = load_skeleton(build(compose([]).model), locate_model(build(compose([]).model)))
    everything = sum(p.numel() for p in skeleton.parameters())
    assert disk_space.parameter_counts(skeleton, plan_adapter(skeleton, {"r": None, "scope": "all"})) == (everything, everything)
    trained, saved = disk_space.parameter_counts(skeleton, plan_adapter(skeleton, {"r": None, "scope": "language"}))
    assert 0 < trained < saved == everything
    assert [disk_space.optimizer_bytes(name) for name in ("adamw_torch", "OptimizerNames.SGD", "adamw_bnb_8bit")] == [8, 0, 2]


@pytest.mark.parametrize("words, times", [([], 1), (["-m", "lora.r=2,4"], 2)])
def test_no_run_starts_without_the_bytes_it_needs(mmft, tmp_path, monkeypatch, words, times):
    from mmft.training import disk_space

    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: type("U", (), {"free": 40 << 20, "total": 1 << 40})())
    out = tmp_path / "o"
    many = [*SMALL, "trainer.max_steps=200"]
    code, said, err = mmft(*words, *many, "evaluation.max_samples=null", f"output_dir={out.as_posix()}", output_dir=False)
    said = said + err
    assert code == (2 if times == 1 else 1) and "40 MB free, and " in said and "11 checkpoints with optimizer state" in said, said
    assert "trainer.save_total_limit" in said and "output_dir=..." in said and out.as_posix() in said and ("each of 2 runs" in said) == (times == 2)
    assert not list(out.rglob("checkpoint-*")) and not list(out.rglob("adapter"))


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 90 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=90m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.long
@pytest.mark.skipif(os.name == "nt", reason="mounts a disk")
@pytest.mark.parametrize("left", [1 << 20, 0])
def test_a_real_disk_that_fills_during_training(mmft, tmp_path, small_disk, left):
    """Another file leaves too little for a checkpoint, or nothing. Once it is removed, the run resumes to the same bytes."""
    from mmft.training import checkpoints

    out, whole, run = tmp_path / "o", tmp_path / "whole", small_disk / "run"
    words = [*SAVING, "trainer.max_steps=60", "trainer.save_steps=3", "trainer.save_total_limit=2", "trainer.logging_steps=1"]
    assert mmft(*words, f"run_dir={whole.as_posix()}", f"output_dir={out.as_posix()}", output_dir=False)[0] == 0
    process = start(run, out, *words[len(SAVING):])
    wait_for(run / "checkpoints" / "checkpoint-6", process)
    filler = small_disk / "other"
    with filler.open("wb") as file:
        try:
            while shutil.disk_usage(small_disk).free > left:
                file.write(b"\0" * min(1 << 16, max(1, shutil.disk_usage(small_disk).free - left)))
                file.flush()
        except OSError:
            assert left == 0
    said, err = process.communicate(timeout=200)
    assert process.returncode == 2 and "Traceback" not in err, err[-3000:]
    assert ("2 MB and 1 MB are free" in err if left else "No space left on device" in err or "needs" in err) and f"mmft resume run={run}" in err, err[-1000:]
    newest = checkpoints.newest(run / "checkpoints")
    assert newest is not None and int(newest.name.split("-")[1]) >= 3
    filler.unlink()
    code, said, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and "from step" in said, err
    assert final(run) == final(whole)
    assert [r["step"] for r in rows(run) if "loss" in r] == list(range(1, 61)) and rows(run) == rows(whole)
    assert json.loads((Path(run) / "summary.json").read_text())["status"] == "finished"


def test_damaged_checkpoints_do_not_count_as_bytes_to_be_reused(tmp_path):
    for name, size in (("adapter/weights", 1000), ("checkpoints/checkpoint-4/weights", 300), ("checkpoints/damaged/checkpoint-8/weights", 5000)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert folder_size(tmp_path) == 6300 and bytes_on_disk(tmp_path) == 1300
