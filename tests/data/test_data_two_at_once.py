"""Several processes at once, through the command line: one prepares, the others wait; a killed one is taken over from."""

import os
import signal
import subprocess
import sys
import time

import pytest
from small import png, write_csv


def command(*words, **options):
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "-m", "mmft", "prepare", *words], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for(condition, process, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end and process.poll() is None, "it ended or never began"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.long
def test_a_killed_preparation_is_taken_over_by_the_one_that_waits(tmp_path):
    rows = 40_000
    (tmp_path / "a.png").write_bytes(png(1))
    table = write_csv(tmp_path / "rows.csv", ["image", "text"], *(["a.png", f"text {i}"] for i in range(rows)))
    words = ["data=table", f"data.path={table}", "data.splits.validation=0", f"output_dir={tmp_path / 'out'}"]
    home = tmp_path / "out" / "data"
    first = command(*words)
    wait_for(lambda: any(p.stat().st_size > 0 for p in home.glob(".table-*.tmp/rows.arrow")), first)
    os.kill(first.pid, signal.SIGSTOP)  # in the middle, holding the lock
    try:
        second, third = command(*words), command(*words)
        # both say that they wait: only then is the first one killed
        waiting = [p.stderr.readline() for p in (second, third)]
        assert all("another process is preparing" in line for line in waiting), waiting
        assert not [p for p in home.iterdir() if p.is_dir() and not p.name.startswith(".")]
    finally:
        os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    outputs = [p.communicate(timeout=120) for p in (second, third)]
    assert [p.returncode for p in (second, third)] == [0, 0], outputs
    fingerprints = {line for out, _ in outputs for line in out.splitlines() if line.startswith("fingerprint")}
    (folder,) = (p for p in home.iterdir() if p.is_dir())
    assert len(fingerprints) == 1 and all(f"{rows} rows read" in out for out, _ in outputs)
    assert sorted(p.name for p in folder.iterdir()) == ["images.arrow", "looks.arrow", "manifest.json", "report.jsonl", "train.arrow", "unusable_images.jsonl"]
