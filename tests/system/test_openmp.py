"""How long OpenMP's threads wait is decided before torch is there, and a user's own word stays."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from mmft.system import openmp


@pytest.mark.parametrize(
    "now, turns",
    [
        ((101.5, 2.0, 12.0), openmp.LONG),  # in two seconds all computed 1.5, of which this process 1.0
        ((102.5, 2.0, 12.0), openmp.BRIEF),  # others 1.5
        (None, openmp.BRIEF),  # no Linux
    ],
)
def test_they_wait_long_where_nothing_else_computes(monkeypatch, now, turns):
    readings = [(100.0, 1.0, 10.0), now]
    monkeypatch.setattr(openmp, "OTHERS", 0.5)
    monkeypatch.setattr(openmp, "_began", None)
    monkeypatch.setattr(openmp, "_reading", lambda: readings.pop(0))
    monkeypatch.delenv(openmp.VARIABLE, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    openmp.begin()
    assert os.environ[openmp.VARIABLE] == str(openmp.BRIEF)
    openmp.settle()
    assert os.environ[openmp.VARIABLE] == str(turns)


def test_a_users_own_number_stays(monkeypatch):
    monkeypatch.setattr(openmp, "_began", None)
    monkeypatch.setattr(openmp, "_reading", lambda: (0.0, 0.0, time.monotonic()))
    monkeypatch.setenv(openmp.VARIABLE, "7")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    openmp.begin()
    openmp.settle()
    assert os.environ[openmp.VARIABLE] == "7"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_a_reading_is_of_all_cores_and_of_this_process():
    before = openmp._reading()
    until = time.process_time() + 0.5
    while time.process_time() < until:
        pass
    busy, own, wall = (b - a for a, b in zip(before, openmp._reading()))
    assert 0.5 <= own <= wall + 0.05 and own - 0.1 < busy < (os.cpu_count() + 1) * wall


def test_it_is_settled_before_torch_is_imported(tmp_path):
    words = ["data.pictures=12", "data.splits.validation=2", "trainer.max_steps=1", "evaluation.split=null", "logger=none", "output_dir=o"]
    code = (
        "import os, sys; from mmft import patience; whole, seen = openmp.settle, []\n"
        "def settle(): seen.append('torch' in sys.modules); whole()\n"
        "openmp.settle = settle\n"
        "from mmft.__main__ import main\n"
        f"assert main({words}) == 0 and 'torch' in sys.modules; print(seen[0], os.environ[openmp.VARIABLE])"
    )
    env = {k: v for k, v in os.environ.items() if k != openmp.VARIABLE}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    settled, turns = done.stdout.splitlines()[-1].split()
    assert settled == "False" and turns in (str(openmp.LONG), str(openmp.BRIEF))
