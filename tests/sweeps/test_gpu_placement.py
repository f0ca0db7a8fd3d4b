"""The GPUs of a machine are shared out, one a process, without a GPU being there."""

import subprocess
import sys
from pathlib import Path

import pytest

from mmft.sweeps import gpu_placement

ROOT = Path(__file__).resolve().parent.parent
HOLD = "import sys, os; from mmft import placement; print(gpu_placement.place('joblib'), os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"


@pytest.mark.parametrize(("variables", "expected"), [
    ({"MMFT_DEVICES": "0,1"}, ["0", "1"]),
    ({"MMFT_DEVICES": ""}, []),
    ({"CUDA_VISIBLE_DEVICES": "2, 3"}, ["2", "3"]),
    ({"CUDA_VISIBLE_DEVICES": "GPU-5ab1,GPU-77"}, ["GPU-5ab1", "GPU-77"]),
    ({"CUDA_VISIBLE_DEVICES": ""}, []),
    ({"MMFT_DEVICES": "1", "CUDA_VISIBLE_DEVICES": ""}, ["1"]),  # submitit hides the GPUs from the processes it starts
])  # fmt: skip
def test_the_gpus_that_may_be_used(monkeypatch, variables, expected):
    for name in ("MMFT_DEVICES", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert gpu_placement.devices() == expected
    assert gpu_placement.workers() >= 1 and (not expected or gpu_placement.workers() == len(expected))


def test_each_process_has_its_own_gpu_and_a_dead_ones_is_free_again(tmp_path, monkeypatch):
    for name, value in {"MMFT_DEVICES": "0,1", "MMFT_LOCKS": str(tmp_path), "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)

    def start():
        return subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    first, second = start(), start()
    held = [p.stdout.readline().split() for p in (first, second)]
    assert sorted(held) == [["0", "0"], ["1", "1"]]
    third = start()  # waits
    first.kill()
    assert third.stdout.readline().split() == held[0]
    for process in (second, third):
        process.kill()
    for process in (first, second, third):
        process.wait()
        process.stdin.close()
        process.stdout.close()


@pytest.mark.parametrize("launcher", ["basic", "submitit_slurm", "ray"])
def test_launchers_that_place_for_themselves_are_left_alone(monkeypatch, launcher):
    monkeypatch.setenv("MMFT_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert gpu_placement.place(launcher) is None
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
