"""A joint group divided among processes on a CPU: the same numbers, signals to all processes, a process that dies."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from places import ROOT
from test_joint import SMALL, assert_equal, runs, swept

from mmft.common.errors import UserError
from mmft.joint.processes import divide, process_count, run_side_by_side

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux only")
SHARED = ["hydra/launcher=joint", "hydra.launcher.processes=2"]
MANY = [*SMALL, "lora.r=2,4,8", "trainer.max_steps=4000", "trainer.save_steps=4000", "trainer.logging_steps=5"]  # more steps than the tests wait for


def start(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "mmft", "-m", *SHARED, *words, f"output_dir={folder.as_posix()}", "name=s"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def training(process: subprocess.Popen, folder: Path, points: int = 3) -> list[psutil.Process]:
    """The processes that train, once every point has logged a step."""
    until = time.time() + 240
    while len(list(folder.rglob("metrics.jsonl"))) < points:
        assert process.poll() is None and time.time() < until, process.stdout.read()
        time.sleep(0.1)
    return psutil.Process(process.pid).children()


def statuses(folder: Path) -> list[str]:
    return sorted(json.loads(p.read_text(encoding="utf-8"))["status"] for p in folder.glob("sweeps/s/*/summary.json"))


@pytest.mark.long
def test_points_in_two_processes_equal_those_in_one(mmft, tmp_path):
    """Three ranks with dropout, clipping and TensorBoard, two processes of a core each: within 1e-5 of one after another."""
    words = [*SMALL, "lora.r=2,4,8", "trainer.max_steps=8", "lora.lora_dropout=0.2", "trainer.max_grad_norm=0.3", "logger=tensorboard"]
    apart, out = swept(mmft, tmp_path / "apart", *words, *SHARED)
    assert "3 points in step, shared by 2 processes" in out and "1|step" in out and "2|step" in out
    alone, _ = swept(mmft, tmp_path / "alone", *words, "hydra/launcher=basic")
    assert_equal(apart, alone)
    for run in apart.values():
        assert json.loads((run / "summary.json").read_text(encoding="utf-8"))["trained_together"] == 3
        own = (run / "log.txt").read_text(encoding="utf-8")
        assert [f"step {n}/8" in own for n in (1, 8)] == [True] * 2 and "finished " in own and "|step" not in own
        assert len(list((run / "tensorboard").iterdir())) == 1, "written by the process that trained it"


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGINT])
@pytest.mark.long
def test_a_signal_reaches_every_process_once(tmp_path, number):
    """To the whole process group, like a terminal's Ctrl-C: a process that got it twice would end in the middle of a step."""
    process = start(tmp_path, *MANY)
    children = training(process, tmp_path)
    assert len(children) == 2
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75 and "Traceback" not in out and out.count("stopping ") == 2, out
    assert not any(child.is_running() for child in children)
    assert statuses(tmp_path) == ["preempted"] * 3
    assert len(list(tmp_path.glob("sweeps/s/*/checkpoints/checkpoint-*"))) == 3


def test_errors_of_a_job_become_errors_of_the_command(capfd):
    def interrupted() -> None:
        raise KeyboardInterrupt

    def refused() -> None:
        raise UserError("x.csv: no such file")

    def broken() -> None:
        raise ZeroDivisionError("by zero")

    def fine() -> dict:
        return {"n": 1}

    with pytest.raises(KeyboardInterrupt):
        run_side_by_side([interrupted, fine])
    with pytest.raises(UserError, match="x.csv: no such file"):
        run_side_by_side([fine, refused])
    good, bad = run_side_by_side([fine, broken])
    assert (good.result, good.why) == ({"n": 1}, None) and (bad.result, bad.why) == (None, "ZeroDivisionError: by zero")


@pytest.mark.long
def test_a_process_that_dies_leaves_the_other_and_the_same_command_resumes(tmp_path):
    few = [word.replace("=4000", "=60") for word in MANY]
    process = start(tmp_path, *few)
    training(process, tmp_path)[1].kill()
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "ended by signal SIGKILL" in out and "Traceback" not in out, out
    done = {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("sweeps/s/*/DONE")}
    assert 1 <= len(done) <= 2
    again = start(tmp_path, *few)
    out, _ = again.communicate(timeout=240)
    assert again.returncode == 0, out
    assert len(list(tmp_path.glob("sweeps/s/*/DONE"))) == 3
    assert done.items() <= {p.parent.name: p.stat().st_mtime_ns for p in tmp_path.glob("sweeps/s/*/DONE")}.items()


@pytest.mark.long
def test_a_killed_command_leaves_no_process_behind(tmp_path):
    process = start(tmp_path, *MANY)
    children = training(process, tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, left = psutil.wait_procs(children, timeout=30)
    assert len(gone) == 2 and not left
    assert runs(tmp_path) and not statuses(tmp_path), "killed, not stopped"


def test_how_points_are_divided_among_how_many_processes(monkeypatch):
    import torch

    from mmft.joint import processes

    ranks = [2, 4, 8, 16, 32, 64, 128, 256]
    best = min(max(sum(four), sum(ranks) - sum(four)) for four in itertools.combinations(ranks, 4))
    parts = divide(ranks, 2)
    assert parts == [[0, 1, 2, 7], [3, 4, 5, 6]] and max(sum(ranks[n] for n in part) for part in parts) == best
    assert divide([1, 1, 1], 2) == [[0, 2], [1]]
    assert sorted(map(len, divide([9, 1, 1, 1, 1, 1], 4))) == [1, 1, 2, 2]
    assert divide([5, 1], 1) == [[0, 1]]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(processes, "free_memory", lambda device: 64 << 30)
    assert [process_count(8, "cpu", None), process_count(3, "cpu", None), process_count(8, "cpu", 1), process_count(8, "cpu", 6), process_count(8, "cuda", 4)] == [4, 3, 1, 6, 1]
    monkeypatch.setattr(processes, "free_memory", lambda device: 2 << 30)
    assert process_count(8, "cpu", None) == 2, "each needs a gigabyte"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert process_count(8, "cpu", None) == 1, "a process that may have used a GPU cannot be forked"
