"""Each process of a sweep gets a GPU of its own; tested without a GPU."""

import subprocess
import sys

import pytest
from places import ROOT

from mmft.sweeps import gpu_placement

HOLD = "import sys, os; from mmft.sweeps import gpu_placement; print(gpu_placement.claim_gpu('joblib'), os.environ['CUDA_VISIBLE_DEVICES'], flush=True); sys.stdin.read()"


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


def test_each_process_has_its_own_gpu_until_it_ends(tmp_path, monkeypatch):
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
def test_launchers_that_assign_gpus_themselves_are_left_alone(monkeypatch, launcher):
    monkeypatch.setenv("MMFT_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert gpu_placement.claim_gpu(launcher) is None
    import os

    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
