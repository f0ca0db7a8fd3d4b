"""A stopped run ends like an undisturbed one: complete or absent checkpoints, exact resume, signals, non-finite steps, memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from interrupted import FAULTS, SMALL, final, harm, killed_after, rows, start, wait_for
from small_models import GROUP


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    from mmft.cli.main import main

    folder = tmp_path_factory.mktemp("undisturbed")
    assert main([*SMALL, f"output_dir={(folder / 'o').as_posix()}", f"run_dir={(folder / 'run').as_posix()}"]) == 0
    return folder / "run"


@pytest.mark.parametrize("step", [2, 5])  # in the middle of the first epoch and at its end (20 rows, 4 a step)
def test_resume_gives_the_same_bytes_and_the_same_log(mmft, tmp_path, undisturbed, step):
    run = killed_after(undisturbed, step, tmp_path / "run")
    code, out, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and f"from step {step}" in out, err
    assert final(run) == final(undisturbed) and rows(run) == rows(undisturbed)
    one, other = (json.loads((r / "summary.json").read_text(encoding="utf-8")) for r in (undisturbed, run))
    for key in ("steps", "supervised_tokens", "eval_loss", "metrics", "train_loss", "status"):
        assert one[key] == other[key], key
    assert other["seconds"] > json.loads((run / "checkpoints" / f"checkpoint-{step}" / "mmft_state.json").read_text())["seconds"], "both parts count"
    assert (run / "resumed.jsonl").is_file() and not list(run.rglob("training_args.bin"))


def test_the_same_command_after_the_end_does_nothing(mmft, undisturbed):
    """A job that is queued again after it was killed at exit; any other config is still refused."""
    words = [*SMALL, f"output_dir={(undisturbed.parent / 'o').as_posix()}", f"run_dir={undisturbed.as_posix()}"]
    before = {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}
    code, out, err = mmft(*words, output_dir=False)
    assert code == 0 and "is finished already" in out and "step 1/6" not in out, err
    code, _, err = mmft(*words, "trainer.learning_rate=0.001", output_dir=False)
    assert code == 2 and "exists already" in err
    assert before == {p: p.stat().st_mtime_ns for p in undisturbed.rglob("*")}


def test_a_directory_without_a_snapshot_is_used_unless_it_has_other_files(mmft, tmp_path, undisturbed):
    """A kill between the creation of the directory and the snapshot leaves at most a torn temporary file."""
    run = tmp_path / "run"
    run.mkdir()
    (run / ".snapshot.yaml.123").write_text("seed: 4", encoding="utf-8")  # torn
    words = [*SMALL, f"output_dir={(undisturbed.parent / 'o').as_posix()}", f"run_dir={run.as_posix()}"]
    (run / "mine.txt").write_text("x", encoding="utf-8")
    code, _, err = mmft(*words, output_dir=False)
    assert code == 2 and "exists already" in err
    (run / "mine.txt").unlink()
    code, _, err = mmft(*words, output_dir=False)
    assert code == 0 and final(run) == final(undisturbed), err


@pytest.mark.long
@pytest.mark.parametrize("kind", ["qwen2vl", "llava", "blip2"])
@pytest.mark.parametrize("accumulate, workers", [(1, 0), (3, 2)])
def test_every_family_accumulation_workers_and_epoch(mmft, small, tmp_path, kind, accumulate, workers):
    from PIL import Image

    lines = ["image,question,answer"]
    for n in range(14):
        Image.new("RGB", (56, 56), (17 * n, 0, 200)).save(tmp_path / f"{n}.png")
        lines.append(f"{n}.png,What is it?,{'a red square ' * (n % 3 + 1)}")
    (tmp_path / "rows.csv").write_text("\n".join(lines), encoding="utf-8")
    words = [
        f"model={GROUP[kind]}", f"model.path={small(kind).as_posix()}", "data=table", f"data.path={(tmp_path / 'rows.csv').as_posix()}",
        "data.columns={image: image, text: answer, prompt: question}", "data.splits={validation: 2}", *SMALL[3:], "trainer.num_train_epochs=3",
        "trainer.max_steps=-1", "trainer.per_device_train_batch_size=2", f"trainer.gradient_accumulation_steps={accumulate}", "vision_cache=off",
        "trainer.fold_accumulation=off", f"trainer.dataloader_num_workers={workers}", "trainer.save_total_limit=30", f"output_dir={(tmp_path / 'o').as_posix()}",
    ]  # fmt: skip
    whole = tmp_path / "whole"
    code, _, err = mmft(*words, f"run_dir={whole.as_posix()}", output_dir=False)
    assert code == 0, err[-2000:]
    steps = json.loads((whole / "summary.json").read_text(encoding="utf-8"))["steps"]
    assert steps == 3 * (6 // accumulate if accumulate == 3 else 6)
    for step in {1, steps // 3, steps // 3 + 1, steps - 1}:
        run = killed_after(whole, step, tmp_path / f"at{step}")
        snapshot = (run / "snapshot.yaml").read_text(encoding="utf-8")
        code, _, err = mmft("resume", f"run={run.as_posix()}")
        assert code == 0, err[-2000:]
        assert final(run) == final(whole) and rows(run) == rows(whole), f"stopped at step {step}"
        changed = killed_after(whole, step, tmp_path / f"changed{step}")  # the number of workers may change
        (changed / "snapshot.yaml").write_text(snapshot.replace(f"dataloader_num_workers: {workers}", f"dataloader_num_workers: {2 - workers}"), encoding="utf-8")
        assert mmft("resume", f"run={changed.as_posix()}")[0] == 0 and final(changed) == final(whole)


FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "mmft_state.json", "adapter_config.json",
         "manifest.json")  # fmt: skip


@pytest.mark.parametrize("name, fault", [("optimizer.pt", "flipped"), ("manifest.json", "deleted")])
def test_a_damaged_checkpoint_is_moved_aside_and_the_one_before_is_used(mmft, tmp_path, undisturbed, name, fault):
    run = killed_after(undisturbed, 4, tmp_path / "run")
    harm(run / "checkpoints" / "checkpoint-4" / name, fault)
    code, out, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and "from step 3" in out and name in out and "moved to" in out, err
    assert final(run) == final(undisturbed) and (run / "checkpoints" / "damaged" / "checkpoint-4").is_dir()


@pytest.mark.long
def test_every_file_damaged_in_every_way(mmft, tmp_path, undisturbed):
    """32 faults in the newest checkpoint: each is found, each run ends with the undisturbed run's bytes."""
    for name in FILES:
        for fault in FAULTS:
            run = killed_after(undisturbed, 4, tmp_path / f"{name}-{fault}")
            harm(run / "checkpoints" / "checkpoint-4" / name, fault)
            code, out, err = mmft("resume", f"run={run.as_posix()}")
            assert code == 0 and "from step 3" in out, (name, fault, err)
            assert final(run) == final(undisturbed), (name, fault)
            shutil.rmtree(run)


def test_without_a_good_checkpoint_the_run_begins_again(mmft, tmp_path, undisturbed):
    run = killed_after(undisturbed, 1, tmp_path / "run")
    harm(run / "checkpoints" / "checkpoint-1" / "optimizer.pt", "zeroed")
    code, out, _ = mmft("resume", f"run={run.as_posix()}")
    assert code == 0 and "from the start: no checkpoint" in out and final(run) == final(undisturbed) and rows(run) == rows(undisturbed)


@pytest.mark.parametrize("after", range(4))
def test_a_kill_while_saving_leaves_the_checkpoints_before_it(mmft, tmp_path, undisturbed, monkeypatch, after):
    """The process dies before the seal, in it, before the renaming, before the rotation: every checkpoint that exists verifies."""
    from mmft.training import checkpoint_writer, checkpoints

    run = killed_after(undisturbed, 4, tmp_path / "run")

    class Killed(BaseException):
        pass

    def die(*_):
        raise Killed

    if after == 2:
        monkeypatch.setattr(os, "replace", lambda a, b, replace=os.replace: die() if Path(b).name.startswith("checkpoint-") else replace(a, b))
    else:
        module, name = ((checkpoint_writer, "seal"), (checkpoints, "sync"), None, (checkpoint_writer, "rotate"))[after]
        monkeypatch.setattr(module, name, die)
    monkeypatch.setattr(shutil, "rmtree", lambda path, rmtree=shutil.rmtree, **k: None if Path(path).name == ".saving" else rmtree(path, **k))
    with pytest.raises(Killed):
        mmft("resume", f"run={run.as_posix()}")
    monkeypatch.undo()
    found = checkpoints.all_in(run / "checkpoints")
    assert [checkpoints.problem(p) for p in found] == [None] * len(found) and len(found) == (5 if after == 3 else 4)
    assert mmft("resume", f"run={run.as_posix()}")[0] == 0
    assert final(run) == final(undisturbed)


def test_a_kill_after_each_file_of_a_save(tmp_path, undisturbed):
    """Until the staged folder is renamed, the newest checkpoint is the one before, however many files are written."""
    from mmft.training import checkpoints

    whole = undisturbed / "checkpoints" / "checkpoint-5"
    files = sorted(p.name for p in whole.iterdir())
    assert len(files) >= 10 and checkpoints.MANIFEST in files
    for n in range(1, len(files) + 1):
        home = tmp_path / str(n)
        shutil.copytree(undisturbed / "checkpoints" / "checkpoint-4", home / "checkpoint-4")
        (home / checkpoints.SAVING / "checkpoint-5").mkdir(parents=True)
        for name in files[:n]:
            shutil.copy(whole / name, home / checkpoints.SAVING / "checkpoint-5" / name)
        torn = home / checkpoints.SAVING / "checkpoint-5" / files[n - 1]
        torn.write_bytes(torn.read_bytes()[:-1])
        assert checkpoints.newest(home).name == "checkpoint-4" and not (home / checkpoints.SAVING).exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    from mmft.training import checkpoints

    for step in (1, 2, 3, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "a").write_text("x")
        checkpoints.seal(folder)
    harm(tmp_path / "checkpoint-10" / "a", "zeroed")
    checkpoints.rotate(tmp_path, tmp_path / "checkpoint-10", 2, str(tmp_path / "checkpoint-1"))
    assert len(checkpoints.all_in(tmp_path)) == 4, "nothing is removed while the newest does not verify"
    (tmp_path / "checkpoint-10" / "a").write_text("x")
    checkpoints.rotate(tmp_path, tmp_path / "checkpoint-10", 2, str(tmp_path / "checkpoint-1"))
    assert [p.name for p in checkpoints.all_in(tmp_path)] == ["checkpoint-1", "checkpoint-10"]


def test_a_full_disk_stops_the_run_in_one_line_and_keeps_its_checkpoints(mmft, tmp_path, undisturbed, monkeypatch):
    from mmft.pipeline import run as pipeline
    from mmft.training import checkpoints

    run = killed_after(undisturbed, 2, tmp_path / "run")
    monkeypatch.setattr(pipeline, "check_disk", lambda *_: None)  # the disk fills up after the start
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("U", (), {"free": 1 << 20})())
    code, _, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 2 and "checkpoint of step 3 needs" in err and "1 MB are free" in err and f"mmft resume run={run}" in err and err.count("\n") == 1
    assert checkpoints.problem(run / "checkpoints" / "checkpoint-2") is None
    monkeypatch.undo()
    assert mmft("resume", f"run={run.as_posix()}")[0] == 0 and final(run) == final(undisturbed)


def test_a_finished_run_is_not_resumed_and_a_changed_config_is_refused(mmft, undisturbed, tmp_path):
    code, out, _ = mmft("resume", f"run={undisturbed.as_posix()}")
    assert code == 0 and "is finished already" in out and "resuming" not in out
    run = killed_after(undisturbed, 2, tmp_path / "run")
    code, _, err = mmft("resume", f"run={run.as_posix()}", "lora.r=3")
    assert code == 2 and "lora.r=3: a run goes on as it began" in err
    code, _, err = mmft(*SMALL, "lora.r=3", f"run_dir={run.as_posix()}")
    assert code == 2 and "exists already" in err, "another config is another run"


def test_a_run_that_another_process_trains_is_refused(mmft, undisturbed, tmp_path):
    from filelock import FileLock

    run = killed_after(undisturbed, 2, tmp_path / "run")
    with FileLock(run / ".lock"):
        code, _, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 2 and "is being trained by another process" in err


def test_a_kill_after_the_adapter_was_saved_can_be_resumed(mmft, tmp_path, undisturbed):
    """A kill while the tuned model was measured: adapter/ exists already, and a torn one of an earlier kill."""
    run = killed_after(undisturbed, 5, tmp_path / "run")
    shutil.copytree(undisturbed / "adapter", run / "adapter")
    shutil.copytree(undisturbed / "adapter", run / ".adapter.1")
    harm(run / "adapter" / "adapter_model.safetensors", "zeroed")
    code, _, err = mmft("resume", f"run={run.as_posix()}")
    assert code == 0, err
    assert final(run) == final(undisturbed) and not list(run.glob(".adapter.*"))


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=pytest.mark.long), pytest.param("SIGUSR1", marks=pytest.mark.long),
                                  pytest.param("SIGUSR2", marks=pytest.mark.long)])  # fmt: skip
@pytest.mark.long
def test_a_signal_finishes_the_step_and_saves_and_the_same_command_resumes(mmft, tmp_path, name):
    run, out = tmp_path / "run", tmp_path / "o"
    more = ["trainer.max_steps=400", "trainer.save_steps=1000", "trainer.logging_steps=1"]
    process = start(run, out, *more)
    wait_for(run / "metrics.jsonl", process)
    process.send_signal(getattr(signal, name))
    said, err = process.communicate(timeout=120)
    assert process.returncode == 75, err[-2000:]
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    assert summary["status"] == "preempted" and 0 < summary["steps"] < 400 and name in said
    saved = [p.name for p in (run / "checkpoints").glob("checkpoint-*")]
    assert saved == [f"checkpoint-{summary['steps']}"]
    process = start(run, out, *more)  # the same command
    wait_for(run / "resumed.jsonl", process)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    said, err = process.communicate(timeout=120)
    assert f"from step {summary['steps']}" in said and process.returncode == 75, err[-2000:]
    assert [r["step"] for r in rows(run) if "loss" in r] == list(range(1, json.loads((run / "summary.json").read_text())["steps"] + 1)), "no row twice, none lost"


def test_an_earlier_signal_handler_is_called_once_the_run_is_saved(mmft, tmp_path, monkeypatch):
    """submitit's own handler queues the job again and exits; before the run is saved it would lose the step."""
    from mmft.training import checkpoints
    from mmft.training.callbacks import Recorder

    run, asked = tmp_path / "run", []
    earlier = signal.signal(signal.SIGUSR2, lambda number, frame: asked.append(checkpoints.newest(run / "checkpoints").name))
    recorded = Recorder.on_step_end

    def kill(self, args, state, control, **kwargs):
        recorded(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(Recorder, "on_step_end", kill)
    try:
        code, _, err = mmft(*SMALL, "trainer.save_strategy=no", f"run_dir={run.as_posix()}")
    finally:
        signal.signal(signal.SIGUSR2, earlier)
    assert code == 75 and asked == ["checkpoint-2"], err


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_killed_at_random_moments(mmft, tmp_path, undisturbed):
    """50 times SIGKILL, every third during a save, and the same command after each; each run ends with the undisturbed bytes.

    A run that was killed four times may finish, and another begins, so that kills come at all moments.
    """
    from mmft.training import checkpoints

    out, dice = undisturbed.parent / "o", random.Random(0)
    kills, saving, ended, steps = 0, 0, 0, []
    while kills < 50:
        run = tmp_path / f"run{ended}"
        for n in range(5):
            process = start(run, out)
            if n == 4 or kills == 50:
                break
            wait_for(run / ("checkpoints/.saving" if kills % 3 == 0 else "checkpoints"), process)
            time.sleep(dice.random() * (0.02 if kills % 3 == 0 else 1.5))
            if process.poll() is not None:
                break  # it has finished
            process.send_signal(signal.SIGSTOP)  # look at what it was doing, then kill it there
            saving += (run / "checkpoints" / ".saving").exists()
            process.kill()
            process.communicate()
            kills += 1
            good = [p for p in checkpoints.all_in(run / "checkpoints") if checkpoints.problem(p) is None]
            assert good == checkpoints.all_in(run / "checkpoints"), "every checkpoint that exists is complete"
            steps.append(len(good))
        _, err = process.communicate(timeout=200)
        assert process.returncode == 0, err[-2000:]
        assert final(run) == final(undisturbed) and rows(run) == rows(undisturbed)
        ended += 1
    print(f"\n{kills} kills, {saving} of them during a save, with 0 to {max(steps)} checkpoints there; {ended} runs, each with the undisturbed bytes")
    assert saving >= 5


@pytest.mark.parametrize("more", [[], ["augment.RandomRotation.degrees=20", "augment.ColorJitter.brightness=0.3"]])
@pytest.mark.long
def test_a_stopped_joint_sweep_resumes(mmft, tmp_path, monkeypatch, more):
    """Two jointly trained points stop after step 3, each with its checkpoint; the same command ends them like undisturbed ones."""
    from mmft.system.signals import Listener
    from mmft.training.callbacks import StopOnSignal

    words = ["-m", "lora.r=2,4", *SMALL, "trainer.save_steps=100", *more]
    code, _, err = mmft(*words, f"output_dir={(tmp_path / 'whole').as_posix()}", output_dir=False)
    assert code == 0, err
    on_step_end = StopOnSignal.on_step_end

    def stop(self, args, state, control, **kwargs):
        if state.global_step == 3 and isinstance(self.listener, Listener):
            self.listener.heard = signal.SIGTERM
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", stop)
    again = (*words, f"output_dir={(tmp_path / 'again').as_posix()}")
    assert mmft(*again, output_dir=False)[0] == 75
    monkeypatch.undo()
    found = {p.parent.name: p.parent for p in (tmp_path / "again").rglob("summary.json")}
    assert {json.loads((p / "summary.json").read_text())["status"] for p in found.values()} == {"preempted"} and len(found) == 2
    code, out, err = mmft(*again, output_dir=False)
    assert code == 0 and out.count("from step 3") == 2 and "2 points in step" in out, err
    for name, run in found.items():
        (whole,) = (tmp_path / "whole").rglob(name)
        assert final(run) == final(whole) and rows(run) == rows(whole)


def test_non_finite_steps_are_skipped_and_counted_up_to_a_limit(mmft, tmp_path, monkeypatch):
    from mmft.training import trainer

    loss = trainer.grouped_loss
    calls = []

    def spoiled(*args):
        calls.append(1)
        value, *counts = loss(*args)
        return (value * float("nan"), *counts) if len(calls) in (2, 4) else (value, *counts)

    monkeypatch.setattr(trainer, "grouped_loss", spoiled)
    words = [*SMALL, "trainer.nonfinite=skip", "evaluation.split=null"]
    code, out, err = mmft(*words, "trainer.save_strategy=no", "trainer.nonfinite_limit=2", f"run_dir={(tmp_path / 'skip').as_posix()}")
    assert code == 0 and out.count("left out") == 2, err
    assert json.loads((tmp_path / "skip" / "summary.json").read_text())["skipped_steps"] == 2
    calls.clear()
    code, _, err = mmft(*words, "trainer.nonfinite_limit=1", f"run_dir={(tmp_path / 'limit').as_posix()}")
    assert code == 2 and "step 4: the loss is not finite" in err and "rows shape" in err
    from mmft.training import checkpoints

    newest = checkpoints.newest(tmp_path / "limit" / "checkpoints")
    assert newest.name == "checkpoint-3", "the last finite step is kept"


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(mmft, tmp_path, monkeypatch):
    """A device on which three rows do not fit: the run goes on with two at a time, with the same rows in every step."""
    import torch

    from mmft.training import trainer

    loss, seen = trainer.grouped_loss, []

    def small_device(model, inputs, *rest):
        if inputs["input_ids"].shape[0] > 2 and len(seen) >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        seen.append(inputs["input_ids"].shape[0])
        return loss(model, inputs, *rest)

    monkeypatch.setattr(trainer, "grouped_loss", small_device)
    run, words = tmp_path / "run", [*SMALL, "lora.lora_dropout=0", "trainer.save_strategy=no", "evaluation.split=null"]
    code, out, err = mmft(*words, f"run_dir={run.as_posix()}")
    assert code == 0 and "out of memory at step 4: micro-batches of 2 rows" in out, err
    summary = json.loads((run / "summary.json").read_text())
    assert summary["out_of_memory"][0]["step"] == 4 and summary["effective_batch_size"] == 4 and seen == [4] * 3 + [2] * 6
    monkeypatch.undo()
    code, _, _ = mmft(*words, f"run_dir={(tmp_path / 'plain').as_posix()}")
    assert [r["loss"] for r in rows(run) if "loss" in r] == pytest.approx([r["loss"] for r in rows(tmp_path / "plain") if "loss" in r], abs=1e-4)
    monkeypatch.setattr(trainer, "grouped_loss", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
    code, _, err = mmft(*words, f"run_dir={(tmp_path / 'none').as_posix()}")
    assert code == 2 and "out of memory with 1 rows a micro-batch: try" in err and err.count("\n") <= 4
