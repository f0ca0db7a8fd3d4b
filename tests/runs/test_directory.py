"""The run directory: two processes never share one, and files are written atomically."""

import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mmft.common.errors import UserError
from mmft.runs.directory import Run, plain_name


def test_threads_that_start_in_the_same_second_get_different_directories(tmp_path):
    with ThreadPoolExecutor(20) as pool:
        runs = list(pool.map(lambda _: Run.create(str(tmp_path), ["tiny", "shapes"]), range(20)))
    assert len({run.path for run in runs}) == 20
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_tiny_shapes(-\d+)?", run.name) for run in runs)


def test_an_existing_run_directory_is_never_overwritten(tmp_path):
    taken = tmp_path / "mine"
    taken.mkdir()
    (taken / "summary.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        Run.create("unused", [], run_dir=str(taken))
    assert (taken / "summary.json").read_text(encoding="utf-8") == "{}"
    assert not (tmp_path / "unused").exists()


def test_a_parent_that_is_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UserError, match="cannot be created"):
        Run.create(str(tmp_path / "file"), ["a"])


def test_a_full_disk_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("mmft.runs.directory.shutil.disk_usage", lambda path: type("Usage", (), {"free": 5 << 20})())
    with pytest.raises(UserError, match="only 5 MB free"):
        Run.create(str(tmp_path / "out"), ["a"])
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_is_complete_or_absent(tmp_path, monkeypatch):
    run = Run.create(str(tmp_path), ["a"])
    run.write_json("summary.json", {"status": "running"})
    monkeypatch.setattr("mmft.runs.directory.os.replace", lambda a, b: (_ for _ in ()).throw(OSError("killed here")))
    with pytest.raises(OSError):
        run.write_json("summary.json", {"status": "finished"})
    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == {"status": "running"}


def test_a_value_json_cannot_hold_is_not_written_as_NaN(tmp_path):
    with pytest.raises(ValueError):
        Run.create(str(tmp_path), ["a"]).write_json("summary.json", {"eval_loss": float("nan")})


@pytest.mark.parametrize("word, name", [("Qwen/Qwen2-VL", "Qwen-Qwen2-VL"), ('a<b>:"c"|d?*', "a-b-c-d"), ("中文", "中文"), ("...", "run"), ("a b", "a-b")])
def test_names_work_on_every_system(word, name):
    assert plain_name(word) == name


def test_reading_a_directory_that_is_no_run_says_so(tmp_path):
    with pytest.raises(UserError, match="is this the directory of a finished run"):
        Run(tmp_path).read_json("summary.json")


def test_twenty_processes_that_start_in_the_same_second_get_twenty_directories(tmp_path):
    """Each process writes its number into the directory that it got."""
    code = (
        "import sys, time\nfrom mmft.runs.directory import Run\nprint('ready', flush=True)\nsys.stdin.readline()\n"
        "run = Run.create(sys.argv[1], ['model', 'data'])\nrun.write_text('who', sys.argv[2])\nprint(run.path)"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for i in range(20)
    ]
    assert all(p.stdout.readline() == "ready\n" for p in processes)
    for p in processes:
        p.stdin.write("go\n")
        p.stdin.flush()
    paths = [p.communicate(timeout=60)[0].strip() for p in processes]
    assert len(set(paths)) == 20 and len(list(tmp_path.iterdir())) == 20
    assert [(Path(path) / "who").read_text() for path in paths] == [str(i) for i in range(20)]
    assert len({Path(path).name[:19] for path in paths}) <= 2, "they did not start at once"
